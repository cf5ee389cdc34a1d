"""Which recipes a search finds, and in which order."""

from django.db.models import Q


def rank(recipes, query):
    """Those that have any word of the query, the oldest first."""
    found = Q()
    for word in query.split():
        found |= Q(title__icontains=word) | Q(text__icontains=word) | Q(tags__icontains=word)
    return recipes.filter(found).order_by("id")
