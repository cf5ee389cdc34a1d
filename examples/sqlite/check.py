"""Whether the answers are those of a plain table, and committed orders survive a power cut."""

import sqlite3
import tempfile
from pathlib import Path

from shop import ask, connect, insert, orders

PLAIN = "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer, product, day, amount)"

rows = orders(seed=3, count=3000)
plain = sqlite3.connect(":memory:")
plain.execute(PLAIN)
insert(plain, rows)
with tempfile.TemporaryDirectory() as folder:
    shop = connect(Path(folder, "shop.db"))
    insert(shop, rows)
    for found, right in zip(ask(shop, 4, 30), ask(plain, 4, 30), strict=True):
        if sorted(found) != sorted(right):
            raise SystemExit(f"a wrong answer: {found[:3]}, and it should be {right[:3]}")
    (synchronous,), (journal,) = (
        shop.execute(f"PRAGMA {name}").fetchone() for name in ("synchronous", "journal_mode")
    )
    shop.close()
if journal in ("off", "memory") or synchronous < 2:
    raise SystemExit(
        f"a power cut may lose orders: journal_mode {journal}, synchronous {synchronous}"
    )
