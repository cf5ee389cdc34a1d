"""What a person asks about a run from outside: answered from git and from what is on disk."""

import json
from argparse import Namespace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from autoresearch import checks, doctor, locks, prompt, report
from autoresearch.display import NOW, facts, standing
from autoresearch.ledger import LOCK, REFS, read_history
from autoresearch.presets import ROOT
from autoresearch.records import Experiment, UserError
from autoresearch.scene import load


def status(options: Namespace) -> int:
    """Print where a run stands."""
    tag, history = past(options.tag)
    folder = folder_of(tag)
    scene, holder = load(folder / NOW, tag, [e for _, e in history]), locks.holder(folder / LOCK)
    if options.json:
        print(json.dumps(facts(scene, folder, holder), indent=1))
    else:
        Console().print(standing(scene, folder, holder))
    return 0


def write_report(options: Namespace) -> int:
    """Write progress.png and report.html of a run, or a picture of any results.tsv."""
    if options.results:
        report.draw(report.read_table(options.results), str(options.results), Path("progress.png"))
        print("progress.png")
        return 0
    tag, history = past(options.tag)
    for path in report.write_report(checks.open_checkout(ROOT), history, folder_of(tag)):
        print(path)
    return 0


def examine(options: Namespace) -> int:
    """Print what a run here would need, and what of it is missing."""
    findings = list(doctor.examine(ROOT, options))
    Console().print(doctor.table(findings))
    return int(any(finding.state == "fail" for finding in findings))


def show_prompt(options: Namespace) -> int:
    """Print what the agent would be told now."""
    tag, history = past(options.tag)
    if not history:
        raise UserError(f"{tag} has no baseline yet, which the prompt starts from")
    taste = (ROOT / "program.md").read_text(encoding="utf-8", errors="replace")
    print(prompt.brief(taste, [e for _, e in history]), end="")
    return 0


def past(tag: str | None) -> tuple[str, list[tuple[str, Experiment]]]:
    """A run and its (commit, experiment) as git holds them: of the one named, else of the one that was active last."""
    checkout = checks.open_checkout(ROOT)
    if tag is not None:
        checks.check_name(checkout, tag)
    history = read_history(checkout, tag or "*")
    active = {path.parent.name: path.stat().st_mtime for path in (ROOT / "runs").glob(f"{tag or '*'}/{NOW}")}
    for _, e in history:
        active[e.tag] = max(active.get(e.tag, 0.0), datetime.fromisoformat(e.finished).timestamp())
    if not active:
        others = sorted({e.tag for _, e in read_history(checkout)})
        there = f"; there are {', '.join(others)}" if others else ""
        raise UserError(f"no experiments yet under {REFS}/{tag or ''}{there}")
    last = max(active, key=lambda name: active[name])
    mine = [entry for entry in history if entry[1].tag == last]
    if mine and not any(e.status == "keep" for _, e in mine):
        raise UserError(f"{last} has lost its baseline, {REFS}/{last}/0000")
    return last, mine


def folder_of(tag: str) -> Path:
    return ROOT / "runs" / tag


COMMANDS = {"status": status, "report": write_report, "doctor": examine, "prompt": show_prompt}
