"""A shop's orders in SQLite, and the questions that are asked of them."""

import random
import sqlite3
from pathlib import Path

ORDERS, CUSTOMERS, PRODUCTS, DAYS = 20_000, 500, 100, 365
QUERIES = {
    "of a customer": "SELECT count(*), sum(amount) FROM orders WHERE customer = ?",
    "of a day": "SELECT product, sum(amount) FROM orders WHERE day = ? GROUP BY product",
    "latest of a product": "SELECT day, id FROM orders WHERE product = ? "
    "ORDER BY day DESC, id LIMIT 5",
}


def connect(file):
    shop = sqlite3.connect(file)
    shop.executescript(Path("schema.sql").read_text())
    return shop


def orders(seed, count=ORDERS):
    """Rows of customer, product, day, amount."""
    rng = random.Random(seed)
    return [
        (
            f"c{rng.randrange(CUSTOMERS)}",
            f"p{rng.randrange(PRODUCTS)}",
            rng.randrange(DAYS),
            rng.randrange(1, 100),
        )
        for _ in range(count)
    ]


def insert(shop, rows):
    with shop:
        shop.executemany(
            "INSERT INTO orders (customer, product, day, amount) VALUES (?, ?, ?, ?)", rows
        )


def ask(shop, seed, count):
    """The answers to so many questions of each kind."""
    rng = random.Random(seed)
    for _ in range(count):
        about = (f"c{rng.randrange(CUSTOMERS)}", rng.randrange(DAYS), f"p{rng.randrange(PRODUCTS)}")
        for query, key in zip(QUERIES.values(), about, strict=True):
            yield shop.execute(query, [key]).fetchall()
