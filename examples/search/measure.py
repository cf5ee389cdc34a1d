"""How well the site answers the queries that editors judged."""

from judge import ndcg

print(f"ndcg: {ndcg('queries.tsv'):.4f}")
