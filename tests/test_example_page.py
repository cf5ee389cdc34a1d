"""The example of a web page: a keep, a discard, a crash, a file that may not change, a guard that
refuses, and the goal."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Project, clean_environment, commit_all, experiment
from test_examples import drive

PAGE = ROOT / "examples/page"
MODULES = ROOT / ".ci/node_modules"  # where .ci/run puts them
PACKAGES = json.loads((PAGE / "package.json").read_text())["dependencies"]
MISSING = [name for name in PACKAGES if not (MODULES / name).is_dir()]

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(MISSING != [], reason=f"not in .ci/node_modules: {', '.join(MISSING)}"),
]

SOME = {
    "<html>": '<html lang="en">',
    "<style>": "<title>Lantern Night</title>\n  <style>",
    "<img ": '<img alt="A lantern" ',
}
REST = {
    ", user-scalable=no": "",
    '<div class="header">': "<header>",
    '<div class="nav" role="menu">': "<nav>",
    '</div>\n    <form action="/search">': '</nav>\n    <form action="/search">',
    "</form>\n  </div>": "</form>\n  </header>\n  <main>",
    '<input name="q"': '<input name="q" aria-label="Search"',
    '<div class="title">Lantern Night</div>': "<h1>Lantern Night</h1>",
    "h3": "h2",
    "h5": "h2",
    "<h4></h4>": "",
    '"/rain"></a>': '"/rain">indoors</a>',
    "<iframe ": '<iframe title="Tides" ',
    "<div>Adults: 8</div>": "<li>Adults: 8</li>",
    "<div>Children: free</div>": "<li>Children: free</li>",
    'id="field"': "",
    ' aria-labeledby="field"': "",
    ' tabindex="1"': "",
    ' tabindex="2"': "",
    ' tabindex="3"': "",
    "<input name=": '<input aria-label="Yours" name=',
    "<select ": '<select aria-label="Boat" ',
    "<textarea ": '<textarea aria-label="Note" ',
    ' role="checkbox" tabindex="0"': "",
    "<p>By train</p>": "<dt>By train</dt>",
    "<p>By car</p>": "<dt>By car</dt>",
    '<div class="footer">': "</main>\n  <footer>",
    "</div>\n</body>": "</footer>\n</body>",
    'href="/feed"': 'href="/feed" aria-label="News"',
}
AGENT = """
case $AUTORESEARCH_EXPERIMENT-$AUTORESEARCH_ATTEMPT in
0001-0) cp ../../../../some.html page.html;;
0002-0) sed -i 's/<p>/<p><img src="boats.jpg">/' page.html;;
0003-0) yes '<div>' | head -3000 > page.html;;
0004-0) echo 'console.log("violations: 0")' > measure.mjs;;
0005-0) sed -i 's/<body>/<body hidden>/' page.html;;
esac
echo idea $AUTORESEARCH_EXPERIMENT
"""


@pytest.fixture
def page(tmp_path: Path) -> Project:
    """A repository of its own, its packages installed."""
    root, home = tmp_path / "page", tmp_path / "home"
    shutil.copytree(PAGE, root, ignore=shutil.ignore_patterns("node_modules"))
    (root / "node_modules").symlink_to(MODULES)  # stands in for npm install
    home.mkdir()
    return commit_all(Project(root.resolve(), clean_environment(home)))


def mend(html: str, edits: dict[str, str]) -> str:
    for old, new in edits.items():
        assert old in html
        html = html.replace(old, new)
    return html


def test_the_packages_are_those_that_are_installed_for_the_tests() -> None:
    wanted = {f"{name}@{version}" for name, version in PACKAGES.items()}
    assert wanted <= {*(ROOT / ".ci/run").read_text().split()}


def test_page(page: Project) -> None:
    html = (page.root / "page.html").read_text()
    assert html == (page.root / "original.html").read_text()
    some = mend(html, SOME)
    (page.root.parent / "some.html").write_text(some)
    (page.root.parent / "all.html").write_text(mend(some, REST))

    drive(page, "--tag=t", f"--agent={AGENT}", "--experiments=5", "--no-report")
    rows = page.rows()
    assert [row["status"] for row in rows] == ["keep", "keep", "discard", "crash", "crash", "crash"]
    assert [row["violations"] for row in rows] == ["52", "39", "44", "", "", ""]
    crash, rejected, refused = (row["description"] for row in rows[3:])
    assert "Maximum call stack size exceeded" in crash
    assert "changed more than page.html: measure.mjs" in rejected
    assert "the guard: lost or hidden: Programme, Tickets" in refused
    assert experiment(page, 1).goal == "lower violations"
    assert experiment(page, 0).facts["image_alt"] == 7
    assert page.git("status", "--porcelain") == ""
    prompt = drive(page, "prompt", "--tag=t")
    assert "52.000000: baseline; +0 lines; region 20, image_alt 7" in prompt
    page.check()

    agent = "cp ../../../../all.html page.html; echo all of it"
    said = drive(page, "--tag=t", f"--agent={agent}", "--until=0", "--no-report")
    assert "stopped: the goal of 0 is reached; 1 experiment recorded" in said
    assert page.rows()[-1]["violations"] == "0"
    page.check()
