"""Baseline and best once more, in turns, with seeds that nothing has run with: what the gain is
when nobody chose the runs."""

import json
from collections.abc import Iterable
from statistics import fmean, stdev

from autoresearch.desk import Desk
from autoresearch.files import UserError
from autoresearch.ideas import Edit, Idea, Reply
from autoresearch.journal.git import Repo
from autoresearch.study import Study
from autoresearch.task import Task

REFS = "refs/autoresearch-audit"  # a blob for each tag, made anew by each audit


def audit(study: Study, desk: Desk, runs: int) -> str:
    """Run both so often, and record it. Returns the gain in words."""
    journal, task = study.journal, study.task
    best = journal.kept[-1]
    first, last = journal.kept[0].commit, best.commit
    if first == last:
        raise UserError("nothing was kept beside the baseline: there is nothing to audit")
    idea = Idea(best.number, journal.folder / "audit", first, "", Edit(Reply("audit"), (), last))
    scores = []
    for seed in range(journal.new_seed, journal.new_seed + runs):
        pair = {}
        for commit in (first, last) if seed % 2 else (last, first):
            run = desk.run(idea, commit, seed, task.worst)
            if run.score is None:
                raise UserError(f"{commit[:10]} crashed with seed {seed}: {run.crash}")
            pair[commit] = run.score
        scores.append([pair[first], pair[last]])
    told = json.dumps({"best": best.number, "scores": scores})
    blob = study.checkout.store(told)
    study.checkout.update_refs(f"update {REFS}/{journal.tag} {blob}")
    return f"the audit finds a gain of {in_words(task, scores)}"


def read_audit(checkout: Repo, tag: str, best: int) -> list[list[float]]:
    """The scores of baseline and best by the last audit of a tag; none if another was the best."""
    if not checkout.refs(f"{REFS}/{tag}"):
        return []
    told = json.loads(checkout.git("cat-file", "blob", f"{REFS}/{tag}"))
    return list(told["scores"]) if told["best"] == best else []


def in_words(task: Task, scores: Iterable[list[float]]) -> str:
    """The gain with its standard error."""
    gains = [task.gain(best, than=baseline) for baseline, best in scores]
    error = f" ± {stdev(gains) / len(gains) ** 0.5:.2g}" if len(gains) > 1 else ""
    return f"{fmean(gains):.4g}{error}"
