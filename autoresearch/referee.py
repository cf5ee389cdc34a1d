"""The referee: a model that would be kept is scored once more, by a clean process that runs nothing of train.py."""

import json
from dataclasses import replace
from pathlib import Path

from autoresearch import process
from autoresearch.records import Crashed, Finished
from autoresearch.trial import Track, reason_of

AGREE = 0.0005  # val_bpb between a compiled model in its own process and its exported graph


def review(track: Track, run: Finished, *, model: Path, log: Path) -> Finished | Crashed:
    """Have the tree's prepare.py score the exported model on validation and sealed rows, with the same probes.

    Returns the run with the referee's scores in the place of its own, which nothing that an agent wrote has touched;
    a crash where there is no model, or where the two do not agree.
    """
    if not model.is_file():
        return Crashed("it left no model for the referee: finish was not called, or not ours", "", run.seconds)
    ended = track.run("prepare.py", "--judge", str(model), log=log)
    end = process.tail(log)
    if ended.code != 0:
        why = f"killed {ended.why}" if ended.code is None else reason_of(ended.code, end)
        return Crashed(f"the referee: {why}", end, run.seconds)
    judged = [line for line in end.splitlines() if line.startswith("judged: ")]  # a library may have the last word
    if not judged:
        return Crashed("the referee: ended without a verdict", end, run.seconds)
    verdict = json.loads(judged[-1].removeprefix("judged: "))
    claimed, scored = run.summary.val_bpb, verdict["val_bpb"]
    if abs(claimed - scored) > AGREE:
        return Crashed(f"claims val_bpb {claimed:.6f}, and the referee scores its model {scored:.6f}", end, run.seconds)
    summary = replace(run.summary, val_bpb=round(scored, 6), val_bpb_upstream=round(verdict["val_bpb_upstream"], 6))
    return replace(run, summary=summary, sealed_bpb=round(verdict["sealed_bpb"], 6), referee_seconds=ended.seconds)
