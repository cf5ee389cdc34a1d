"""The report of a run: its content, that no text in it can act, and that it works in a browser."""

import html
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TASK, Project, experiment
from test_display import timed
from test_prompt import night

from autoresearch.files import UserError, write_whole
from autoresearch.journal import journal
from autoresearch.journal.experiment import Experiment
from autoresearch.journal.git import Repo
from autoresearch.view import report

EVIL = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
CHROMIUM = shutil.which("chromium")
TEMPLATE = ROOT / "autoresearch/view/report.html"


@pytest.fixture
def reported(project: Project) -> Project:
    """A run whose agent, program and log all try to be HTML; the experiments after the baseline are
    kept, discarded, crashed, rejected."""
    script = project.root.parent / "agent.py"
    script.write_text(AGENT.replace("EVIL", repr(EVIL)))
    project.research(f"{sys.executable} {script}", experiments=4)
    return project


AGENT = """
import os, pathlib, re
evil, number, train = EVIL, int(os.environ["AUTORESEARCH_EXPERIMENT"]), pathlib.Path("train.py")
text, idea = train.read_text(), "lower the score"
if number == 1:
    text = re.sub("(?m)^VAL_BPB = [0-9.]*", "VAL_BPB = 0.9", text)
if number == 2:
    text += f"print({evil + '</pre></script>'!r})\\n"
    idea = f"because {evil}\\n\\nan idea {evil}"
if number == 3:
    text, idea = text + f"raise ValueError('</td>' + {evil!r})\\n", "crash"
if number == 4:
    pathlib.Path("&<b>").touch()
    text, idea = text + "X = 2\\n", "more than the file"
train.write_text(text)
print(idea)
"""


def tags(text: str) -> list[str]:
    """The tags of a page, as a browser's parser finds them before any script runs."""
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: found.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    return found


def data_of(project: Project) -> dict[str, Any]:
    page = (project.root / "runs/t/report.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return dict(json.loads(data))


def browse(page: Path, script: str) -> Any:
    """Open a page in a browser, run the body of a function in it and return its value."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    tested = page.with_name("tested.html")
    out = f"const out = (() => {{{script}}})();"
    out += "document.body.dataset.out = JSON.stringify([document.title, out])"
    tested.write_text(f"{page.read_text()}<script>{out}</script>")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
    )
    where = (f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", f"file://{tested}")
    command = [CHROMIUM, *flags.split(), *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-out="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr
    title, value = json.loads(html.unescape(found[1]))
    assert title.startswith(("t: ", "nov23: "))
    return value


def test_no_text_becomes_a_tag(reported: Project) -> None:
    """Without a browser: the page has the tags of its template, and its script never makes HTML."""
    reported.loop("report", "--tag=t")
    text = (reported.root / "runs/t/report.html").read_text()
    template = TEMPLATE.read_text()
    assert tags(text) == tags(template)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", template)
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", text)  # one file, no network
    _, _, two, three, four = data_of(reported)["experiments"]
    assert f"an idea {EVIL}"[:60] in two["description"] and f"because {EVIL}" in two["reason"]
    assert "</pre></script>" in two["diff"] and "</pre></script>" in two["log"]
    assert three["figures"]["Crash"].startswith("ValueError: </td><script>")
    assert four["figures"]["Crash"] == "changed more than train.py: &<b>"


def test_report_in_a_browser(reported: Project) -> None:
    said = reported.loop("report", "--tag=t")
    picture, page = (Path(line) for line in said.splitlines())
    assert picture.read_bytes().startswith(b"\x89PNG") and page.parent == reported.root / "runs/t"
    opened = browse(
        page,
        """
        const count = tag => document.getElementsByTagName(tag).length, all = [];
        for (const n of [1, 2, 3, 4]) {
            document.querySelector(`tr[data-n="${n}"]`).click();
            all.push(document.querySelector('.details').innerText);
        }
        document.querySelector('tr[data-n="4"]').click();
        return [all, ['script', 'img', 'b', 'tr.details'].map(count)];
        """,
    )
    (one, two, three, four), counts = opened
    # the two scripts of the page and ours, the chart, the headline; the second click closes
    assert counts == [3, 1, 5, 0]
    assert "-VAL_BPB = 1.0 # [0.5, 2.0] the score" in " ".join(one.split())
    assert "+VAL_BPB = 0.9" in one and "Steps" in one
    assert f"git show {reported.git('rev-parse', 'refs/autoresearch/t/0001')}" in one
    assert f"because {EVIL}" in two and f"an idea {EVIL}"[:60] in two and "</pre></script>" in two
    assert "No score: ValueError: </td><script>" in three and "Traceback" in three
    assert "No score: changed more than train.py: &<b>" in four


def test_sorting_filtering_and_links(reported: Project) -> None:
    _, page = (Path(line) for line in reported.loop("report").splitlines())
    script = """
        const rows = () => [...document.querySelectorAll('tr[data-n]')];
        const shown = () => rows().filter(row => !row.hidden).map(row => +row.dataset.n);
        const heads = document.querySelectorAll('#all th'), out = [];
        for (const column of [2, 2, 0]) { heads[column].click(); out.push(shown()); }
        const filter = document.getElementById('filter');
        const verdict = document.getElementById('verdict');
        const set = (field, value) => {
            field.value = value;
            field.dispatchEvent(new Event(field === filter ? 'input' : 'change'));
        };
        set(filter, 'LOWER score'); out.push(shown());
        set(filter, 'VAL_BPB'); out.push(shown());
        set(filter, ''); set(verdict, 'crash'); out.push(shown());
        const chart = document.getElementById('chart').src.slice(0, 30);
        for (const list of ['gains', 'parts']) {
            document.querySelector(`#${list} a`).click();
            const row = document.querySelector('.details').previousElementSibling;
            out.push([row.dataset.n, shown().length]);
        }
        return [chart, ...out];
        """
    chart, up, down, number, words, diff, crash, gain, part = browse(page, script)
    assert chart.startswith("data:image/png;base64,iVBOR")
    assert up == [1, 2, 0, 3, 4] and down == [0, 1, 2, 3, 4] and number == [0, 1, 2, 3, 4]
    assert words == [1] and diff == [1] and crash == [3, 4]
    assert gain == part == ["1", 5]  # it opens, though the filter had hidden it


def test_content(reported: Project) -> None:
    reported.loop("report", "--tag=t")
    data = data_of(reported)
    belief = " ".join(data["belief"])
    assert data["boxes"]["-0.1000 from the baseline's 1.0000"] == "-10.00%"
    assert data["boxes"]["experiments after the baseline: 1 kept, 1 discarded, 2 crashed"] == "4"
    assert "went from 1.1000 to 1.0000: -0.1000, 100% of the gain" in belief
    assert "ran once each" in belief and "no call told its cost" in data["cost"]
    assert data["gains"] == [1] and ["VAL_BPB", [["0.9", 1]]] in data["parts"]
    assert "+VAL_BPB = 0.9" in data["diff"] and "print" not in data["diff"]
    assert data["best"] == reported.git("rev-parse", "refs/autoresearch/t/0001")
    assert any(line.startswith("agent 0:0") for line in data["time"])
    one = data["experiments"][1]
    assert (one["difference"], one["lines"], one["outcome"]) == ("-0.100000", "+0", "-0.100000")
    assert {"Val-bpb", "Incumbent", "Steps", "Agent-seconds", "Seed", "Torch"} < set(one["figures"])


def test_a_run_ends_with_its_report(project: Project) -> None:
    agent = 'echo "X = 1" >> train.py; echo the last idea'
    command = project.command("--tag=t", "--arena=demo", f"--agent={agent}", "--experiments=1")
    command.remove("--no-report")
    subprocess.run(command, cwd=project.root, env=project.env, capture_output=True, check=True)
    assert "the last idea" in (project.root / "runs/t/report.html").read_text()
    assert (project.root / "runs/t/progress.png").exists()
    project.check()


def test_a_report_of_nothing(project: Project) -> None:
    assert "no experiments yet" in project.loop("report", code=1)


def test_two_writers_at_once(tmp_path: Path) -> None:
    """A file that another process is about to write stays."""
    other = tmp_path / "report.html.1.new"
    other.write_text("half")
    write_whole(tmp_path / "report.html", b"whole")
    assert (tmp_path / "report.html").read_text() == "whole" and other.read_text() == "half"
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, b"")
    assert len(list(tmp_path.iterdir())) == 2


UPSTREAM = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
a1b2c3d\t0.997900\t44.0\tkeep\tbaseline
b2c3d4e\t0.993200\t44.2\tkeep\tincrease LR to 0.04 & "quoted
c3d4e5f\t1.005000\t44.0\tdiscard\tswitch to GeLU activation
d4e5f6g\t0.000000\t0.0\tcrash\tdouble model width (OOM)
"""


def test_a_table_of_upstream(project: Project) -> None:
    table = project.root.parent / "theirs.tsv"
    table.write_text(UPSTREAM)
    verdicts = ["keep", "keep", "discard", "crash"]
    assert [(p.number, p.verdict) for p in report.read_table(table)] == list(enumerate(verdicts))
    assert project.loop("report", f"--results={table}") == "progress.png\n"
    assert (project.root / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_our_own_table(reported: Project) -> None:
    points = report.read_table(reported.root / "results.tsv")
    verdicts = ["keep", "keep", "discard", "crash", "crash"]
    assert [(p.number, p.verdict) for p in points] == list(enumerate(verdicts))
    assert points[1].score == experiment(reported, 1).score


@pytest.mark.parametrize("idea", ["=1+1", "+1 layer", "-1 layer", "@SUM(1)"])
@pytest.mark.parametrize("before", ["", " ", "\t", "\r"])
def test_no_spreadsheet_computes_an_idea(tmp_path: Path, before: str, idea: str) -> None:
    table, e = tmp_path / "results.tsv", replace(night(1)[0], description=before + idea)
    table.write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n" + journal.row(e))
    assert table.read_text().splitlines()[1].split("\t")[4] == f"'{idea}"
    assert [p.description for p in report.read_table(table)] == [idea]


@pytest.mark.parametrize(
    "text", ["", "a\tb\n1\t2\n", "commit\tval_bpb\tstatus\tdescription\nx\tlow\tkeep\tidea\n"]
)
def test_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is no results.tsv|nothing to draw"):
        report.draw(report.read_table(path), "", tmp_path / "x.png", "val_bpb", False)


def only(verdict: str) -> list[Experiment]:
    return [e for e in night(30) if e.number == 0 or e.verdict == verdict]


def far_off() -> Iterator[Experiment]:
    for e in only("discard"):
        yield replace(e, scores={e.seed: 1000.0 * e.number or 1.0})


@pytest.mark.parametrize(
    "history", [night(1), night(2), night(1000), only("crash"), list(far_off())]
)
def test_any_night_can_be_drawn(history: list[Experiment], tmp_path: Path) -> None:
    history = [replace(e, description="$x_$ \\frac{ $") for e in timed(history)]
    points = report.points_of(history)
    report.draw(points, "$100", tmp_path / "progress.png", "val_bpb", False)
    curve = report.curve_of(points)
    best = [value for _, value in curve.best]
    assert curve.low < min(best) <= max(best) < curve.high
    assert len(curve.points) == sum(e.score is not None for e in history)


def test_scores_that_follow_the_speed_are_told() -> None:
    history = list(timed(night(40)))
    slow = [
        replace(e, facts={**e.facts, "tokens_M": 50.0 / e.score**9}) if e.score else e
        for e in history
    ]
    said = report.speed(slow, history[0])[0]
    assert "those that saw less scored worse (correlation -1.00)" in said
    assert "scored worse" not in report.speed(history, history[0])[0]  # all saw the same


def test_a_diff_that_looks_like_the_next_commit(project: Project) -> None:
    """Each experiment gets its own diff, even where the diff quotes a commit."""
    agent = 'echo "# $(git rev-parse HEAD)\nX$AUTORESEARCH_EXPERIMENT = 1" >> train.py; echo idea'
    project.research(agent, experiments=2)
    commits = [project.git("rev-parse", f"refs/autoresearch/t/000{i}") for i in range(3)]
    history = [replace(experiment(project, i), commit=commit) for i, commit in enumerate(commits)]
    none, *own = report.diffs(Repo.at(project.root), history)
    assert none == "" and ["+X0001 = 1" in own[0], "+X0002 = 1" in own[1]] == [True, True]
    assert "X0002" not in own[0]


def test_a_long_night_is_a_page_of_a_few_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Repo.at(ROOT)
    commit = checkout.resolve("HEAD") or ""
    history = [replace(e, tag="nov23", commit=commit) for e in timed(night(1000))]
    monkeypatch.setattr(report, "diffs", lambda *_: ["@@ -1 +1 @@\n-old\n+new\n" * 50] * 1000)
    start = time.perf_counter()
    _, page = report.write_report(checkout, TASK, history, tmp_path)
    print(f"{time.perf_counter() - start:.1f} s")
    assert page.stat().st_size < 8_000_000
    assert browse(page, "return document.querySelectorAll('tr[data-n]').length") == 1000
