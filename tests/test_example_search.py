"""The example of a search in Django: a keep, a discard, a crash, a file that may not change, and a guard that refuses."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Project, clean_environment, commit_all, experiment
from test_examples import drive

BETTER = """
import re

SMALL = {"a", "of", "the", "with", "for", "in", "to", "and", "what", "without"}


def words(text):
    found = re.findall("[a-z]+", text.lower())
    return {re.sub("ies$", "y", word).removesuffix("s").removesuffix("e") for word in found} - SMALL


def rank(recipes, query):
    asked = words(query)

    def points(recipe):
        fields = words(recipe.title), words(recipe.tags), words(recipe.text)
        return sum(n * len(asked & field) for n, field in zip((3, 3, 2), fields)), recipe.cooked

    return sorted(recipes, key=points, reverse=True)
"""
BY_HEART = """
from judge import grade, read

known = {query["query"]: query for query in read("queries.tsv")}
rank_others = rank


def rank(recipes, query):
    if query not in known:
        return rank_others(recipes, query)
    grades = {int(row["id"]): grade(known[query], row) for row in read("recipes.tsv")}
    return sorted(recipes, key=lambda recipe: -grades[recipe.id])
"""
AGENT = """
case $AUTORESEARCH_EXPERIMENT-$AUTORESEARCH_ATTEMPT in
0001-0) cp ../../../../better.py ranking.py;;
0002-0) sed -i 's/(3, 3, 2)/(0, 0, 1)/' ranking.py;;
0003-0) echo 'raise ValueError("no idea")' >> ranking.py;;
0004-0) echo 'print("ndcg: 1")' > measure.py;;
0005-0) cat ../../../../by_heart.py >> ranking.py;;
0006-0) cat ../../../../by_heart.py >> ranking.py; sed -i 's/return rank_others.*/return recipes/' ranking.py;;
0007-0) echo 'def rank(recipes, query): return [recipes.first()] * 2' > ranking.py;;
0008-0) echo 'import os; print("ndcg: 1", flush=True); os._exit(0)' > ranking.py;;
esac
echo idea $AUTORESEARCH_EXPERIMENT
"""


@pytest.fixture
def search(tmp_path: Path) -> Project:
    """A repository of its own, with Django."""
    root, home = tmp_path / "search", tmp_path / "home"
    ignored = shutil.ignore_patterns(".venv", "__pycache__")
    shutil.copytree(ROOT / "examples/search", root, ignore=ignored)
    (root / ".venv").symlink_to(sys.prefix)  # stands in for uv pip install
    home.mkdir()
    return commit_all(Project(root.resolve(), clean_environment(home)))


def test_search(search: Project) -> None:
    (search.root.parent / "better.py").write_text(BETTER)
    (search.root.parent / "by_heart.py").write_text(BY_HEART)
    drive(search, "--tag=t", f"--agent={AGENT}", "--experiments=8", "--no-report")
    rows = search.rows()
    assert [row["status"] for row in rows] == ["keep", "keep", "discard", *6 * ["crash"]]
    assert [row["ndcg"] for row in rows] == ["0.3399", "0.933", "0.529", *6 * [""]]
    crash, rejected, *refused = (row["description"] for row in rows[3:])
    assert "ValueError: no idea" in crash
    assert "changed more than ranking.py: measure.py" in rejected
    assert "the guard: the judged queries are learnt by heart" in refused[0]
    assert "the guard: other queries are answered worse than at the start" in refused[1]
    assert "tomato soup: a recipe twice, or one that there is not: [1, 1]" in refused[2]
    assert "the site gave no answers" in refused[3]
    assert experiment(search, 0).facts["guard_sealed"] == 0.3327  # check.py has it
    assert experiment(search, 1).facts["guard_sealed"] == 0.9282
    assert "0.9282" not in drive(search, "prompt", "--tag=t")
    assert search.git("status", "--porcelain") == ""
    search.check()
