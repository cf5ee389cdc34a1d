"""A recipe site with one page: /search?q=... shows ten recipes."""

import csv
from pathlib import Path

import django
from django.conf import settings
from django.db import connection, models
from django.http import JsonResponse
from django.urls import path
from ranking import rank

settings.configure(
    ALLOWED_HOSTS=["testserver"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    ROOT_URLCONF=__name__,
)
django.setup()


class Recipe(models.Model):
    title = models.CharField(max_length=80)
    text = models.TextField()
    tags = models.CharField(max_length=80)
    cooked = models.IntegerField()  # by so many readers

    class Meta:
        app_label = "recipes"


def search(request):
    found = rank(Recipe.objects.all(), request.GET["q"])
    return JsonResponse({"recipes": [{"id": r.id, "title": r.title} for r in found[:10]]})


urlpatterns = [path("search", search)]


def load():
    """Make the table. What editors know of a recipe, `main` and `dish`, is not on the site."""
    with connection.schema_editor() as editor:
        editor.create_model(Recipe)
    names = [field.name for field in Recipe._meta.fields]
    with Path("recipes.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        Recipe.objects.bulk_create(Recipe(**{name: row[name] for name in names}) for row in rows)
