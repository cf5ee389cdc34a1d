"""nDCG@10 of the site's answers: 1 where the best recipes come first, 0 where none of ten fits.

The site runs in a process of its own: an agent edits `ranking.py`, which could print any number.
"""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

SITE = """
import json, sys
from app import load
from django.test import Client
load()
pages = [Client().get("/search", {"q": query}).json() for query in json.load(sys.stdin)]
json.dump([[recipe["id"] for recipe in page["recipes"]] for page in pages], sys.stdout)
"""
POPULAR = 500  # readers who cooked it


def read(name):
    with Path(name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def grade(query, recipe):
    """3 if ingredient and dish are as asked and the recipe is popular, 2 if it is not popular, 1 if
    only one of the two is as asked, else 0."""
    fits = [recipe[part] == query[part] for part in ("main", "dish") if query[part]]
    return 2 + (int(recipe["cooked"]) >= POPULAR) if all(fits) else int(any(fits))


def gain(grades):
    return sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(grades[:10]))


def ndcg(name):
    """The average over the queries of a file."""
    queries, recipes = read(name), {int(row["id"]): row for row in read("recipes.tsv")}
    asked = json.dumps([query["query"] for query in queries])
    command = [sys.executable, "-c", SITE]
    site = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True)
    if site.returncode:
        sys.exit(1)  # its last line says why
    try:
        answers = json.loads(site.stdout)
    except ValueError:
        sys.exit("the site gave no answers, or printed something else")
    total = 0.0
    for query, ids in zip(queries, answers, strict=True):
        if len({*ids}) < len(ids) or not {*ids} <= recipes.keys():
            sys.exit(f"{query['query']}: a recipe twice, or one that there is not: {ids}")
        grades = {key: grade(query, recipe) for key, recipe in recipes.items()}
        best = sorted(grades.values(), reverse=True)
        total += gain([grades[key] for key in ids]) / gain(best)
    return total / len(queries)
