"""The report of a run: what stands in it, that nothing in it can act, and that it works in a browser."""

import html
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Project, experiment, wait_for
from test_display import timed
from test_prompt import night

from autoresearch import report
from autoresearch.git import Repo
from autoresearch.records import Experiment, UserError
from autoresearch.scene import figures

EVIL = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def reported(project: Project) -> Project:
    """A run whose agent, program and log all try to be HTML; its experiments: kept, discarded, crashed, rejected."""
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
    text, idea = text + f"print({evil + '</pre></script>'!r})\\n", f"because {evil}\\n\\nan idea {evil}"
if number == 3:
    text, idea = text + f"raise ValueError('</td>' + {evil!r})\\n", "crash"
if number == 4:
    pathlib.Path("&<b>").touch()
    text, idea = text + "X = 2\\n", "more than the file"
train.write_text(text)
print(idea)
"""


def browse(page: Path, script: str) -> Any:
    """Open a page in a browser, run a script's body in it and return what that returns, and the title."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    tested = page.with_name("tested.html")
    run = (
        "<script>const out = (() => {%s})();document.body.dataset.out = JSON.stringify([document.title, out])</script>"
    )
    tested.write_text(page.read_text() + run % script)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", f"file://{tested}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-out="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr
    title, out = json.loads(html.unescape(found[1]))
    assert title.startswith(("t: ", "nov23: "))
    return out


def test_report_in_a_browser(reported: Project) -> None:
    said = reported.loop("report", "--tag=t")
    picture, page = (Path(line) for line in said.splitlines())
    assert picture.read_bytes().startswith(b"\x89PNG") and page.parent == reported.root / "runs/t"
    text = page.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", text)  # one file, no network
    counts = browse(page, "return ['script', 'img', 'b'].map(tag => document.getElementsByTagName(tag).length)")
    assert counts == [3, 0, 5]  # the page's two and the test's one; the five figures at the top
    opened = browse(
        page,
        """
        const rows = [...document.querySelectorAll('tr[data-n]')], all = [];
        for (const n of [1, 2, 3, 4]) {
            rows.find(row => row.dataset.n == n).click();
            all.push(document.querySelector('tr.details').innerText);
        }
        return [all, document.getElementsByTagName('img').length,
                getComputedStyle(document.querySelector('tr.details')).display];
        """,
    )
    (one, two, three, four), images, _ = opened
    assert images == 0
    assert "-VAL_BPB = 1.0 # [0.5, 2.0] the score" in " ".join(one.split()) and "+VAL_BPB = 0.9" in one
    assert f"git show {reported.git('rev-parse', 'refs/autoresearch/t/0001')}" in one and "steps" in one
    assert f"because {EVIL}" in two and f"an idea {EVIL}"[:60] in two and "</pre></script>" in two
    assert "No number: ValueError: </td><script>" in three and "Traceback" in three
    assert "No number: changed more than train.py: &<b>" in four


def test_sorting_filtering_and_the_chart(reported: Project) -> None:
    _, page = (Path(line) for line in reported.loop("report").splitlines())
    shown = "[...document.querySelectorAll('tr[data-n]')].filter(row => !row.hidden).map(row => +row.dataset.n)"
    script = f"""
        const shown = () => {shown}, heads = document.querySelectorAll('#all th'), out = [];
        heads[2].click(); out.push(shown());
        heads[2].click(); out.push(shown());
        heads[0].click(); out.push(shown());
        const filter = document.getElementById('filter'), verdict = document.getElementById('verdict');
        const set = (field, value) => {{
            field.value = value;
            field.dispatchEvent(new Event(field === filter ? 'input' : 'change'));
        }};
        set(filter, 'LOWER score'); out.push(shown());
        set(filter, 'VAL_BPB'); out.push(shown());
        set(filter, ''); set(verdict, 'crash'); out.push(shown());
        document.querySelector('circle[data-n="1"]').dispatchEvent(new MouseEvent('click', {{bubbles: true}}));
        out.push(document.querySelector('tr.details').innerText.includes('lower the score'));
        const point = document.querySelector('circle[data-n="1"]');
        point.dispatchEvent(new MouseEvent('mousemove', {{clientX: 5, clientY: 5}}));
        out.push(document.getElementById('tip').textContent);
        return out;
        """
    up, down, number, words, diff, crash, opened, tip = browse(page, script)
    assert up == [1, 2, 0, 3, 4] and down == [0, 1, 2, 3, 4] and number == [0, 1, 2, 3, 4]
    assert words == [1] and diff == [1] and crash == [3, 4]
    assert opened and tip == "1: 0.900000 keep. lower the score"


def test_what_the_report_says(reported: Project) -> None:
    reported.loop("report", "--tag=t")
    text = html.unescape(re.sub(r"<[^>]+>", " ", (reported.root / "runs/t/report.html").read_text()))
    assert "experiments after the baseline: 1 kept, 1 discarded, 2 crashed" in text
    assert "-0.1000 from the baseline's 1.0000; -0.1000 on sealed text" in text
    assert "it went from 1.1000 to 1.0000: -0.1000, 100% of the gain" in text
    assert "no call said what it cost" in text and "each trained once" in text
    assert "+VAL_BPB = 0.9" in text  # the whole diff


def test_it_is_made_again_after_each_experiment(project: Project) -> None:
    """By itself, in the background, and once more at the end."""
    go = project.root.parent / "go"
    agent = f"[ $AUTORESEARCH_EXPERIMENT = 0001 ] || while [ ! -e {go} ]; do sleep 0.05; done; "
    agent += "echo \"X = '$AUTORESEARCH_EXPERIMENT'\" >> train.py; echo idea $AUTORESEARCH_EXPERIMENT"
    command = [*project.command("--tag=t", "--arena=demo", f"--agent={agent}", "--experiments=2")]
    command.remove("--no-report")
    driver = subprocess.Popen(command, cwd=project.root, env=project.env, stdout=subprocess.DEVNULL)
    page = project.root / "runs/t/report.html"
    wait_for(lambda: page.exists() and "baseline" in page.read_text())
    go.touch()
    assert driver.wait(timeout=60) == 0
    assert "idea 0002" in page.read_text() and (project.root / "runs/t/progress.png").exists()
    project.check()


def test_a_report_of_nothing(project: Project) -> None:
    assert "no experiments yet" in project.loop("report", code=1)


UPSTREAM = """commit\tval_bpb\tmemory_gb\tstatus\tdescription
a1b2c3d\t0.997900\t44.0\tkeep\tbaseline
b2c3d4e\t0.993200\t44.2\tkeep\tincrease LR to 0.04 & "quoted
c3d4e5f\t1.005000\t44.0\tdiscard\tswitch to GeLU activation
d4e5f6g\t0.000000\t0.0\tcrash\tdouble model width (OOM)
"""


def test_upstreams_own_table(project: Project) -> None:
    table = project.root.parent / "theirs.tsv"
    table.write_text(UPSTREAM)
    assert [(p.number, p.status) for p in report.read_table(table)] == [
        (0, "keep"), (1, "keep"), (2, "discard"), (3, "crash"),
    ]  # fmt: skip
    assert project.loop("report", f"--results={table}") == "progress.png\n"
    assert (project.root / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_our_own_table(reported: Project) -> None:
    points = report.read_table(reported.root / "results.tsv")
    assert [(p.number, p.status) for p in points] == [
        (0, "keep"), (1, "keep"), (2, "discard"), (3, "crash"), (4, "crash"),
    ]  # fmt: skip
    assert points[1].val_bpb == experiment(reported, 1).val_bpb


@pytest.mark.parametrize("text", ["", "a\tb\n1\t2\n", "commit\tval_bpb\tstatus\tdescription\nx\tlow\tkeep\tidea\n"])
def test_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is no results.tsv|nothing to draw"):
        report.draw(report.read_table(path), "", tmp_path / "x.png")


def only(status: str) -> Callable[[Experiment], bool]:
    return lambda e: e.number == 0 or e.status == status


@pytest.mark.parametrize("history", [
    night(1), night(2), night(1000), [e for e in night(30) if only("crash")(e)],
    [replace(e, val_bpb=(e.val_bpb and 1000.0 * e.number) or 1.0) for e in night(30) if only("discard")(e)],
])  # fmt: skip
def test_any_night_can_be_drawn(history: list[Experiment], tmp_path: Path) -> None:
    history = [replace(e, description="$x_$ \\frac{ $") for e in timed(history)]
    report.draw(report.points_of(history), "$100", tmp_path / "progress.png")
    points = report.curve_of(report.points_of(history))
    assert points.low < min(value for _, value in points.best) <= max(value for _, value in points.best) < points.high
    assert report.svg(history).count('class="point ') == sum(e.val_bpb is not None for e in history)


def test_scores_that_follow_the_speed_are_told() -> None:
    history = list(timed(night(40)))
    slow = [replace(e, tokens_M=50.0 / e.val_bpb**9) if e.val_bpb else e for e in history]
    assert "those that saw less scored worse (correlation -1.00)" in report.speed(slow, history[0])[0]
    assert "scored worse" not in report.speed(history, history[0])[0]  # all saw the same


def test_a_diff_that_looks_like_the_next_commit(project: Project) -> None:
    """Each experiment gets its own diff, whatever stands in it."""
    agent = 'echo "# $(git rev-parse HEAD)\nX$AUTORESEARCH_EXPERIMENT = 1" >> train.py; echo idea'
    project.research(agent, experiments=2)
    checkout = Repo.at(project.root)
    commits = [project.git("rev-parse", f"refs/autoresearch/t/000{i}") for i in range(3)]
    none, *own = report.diffs(checkout, [(commit, experiment(project, i)) for i, commit in enumerate(commits)])
    assert none == "" and ["+X0001 = 1" in own[0], "+X0002 = 1" in own[1]] == [True, True]
    assert "X0002" not in own[0]


def test_a_long_night_is_a_page_of_a_few_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = [replace(e, tag="nov23") for e in timed(night(1000))]
    monkeypatch.setattr(report, "diffs", lambda *_: ["@@ -1 +1 @@\n-old\n+new\n" * 50] * 1000)
    start = time.perf_counter()
    assert figures(history)
    checkout = Repo.at(ROOT)
    _, page = report.write_report(checkout, [(checkout.resolve("HEAD") or "", e) for e in history], tmp_path)
    print(f"{time.perf_counter() - start:.1f} s")
    assert page.stat().st_size < 8_000_000
    assert browse(page, "return document.querySelectorAll('tr[data-n]').length") == 1000
