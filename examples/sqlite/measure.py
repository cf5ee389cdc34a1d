"""How long the shop takes to answer, with some orders coming in between."""

import tempfile
import time
from pathlib import Path

from shop import ask, connect, insert, orders

with tempfile.TemporaryDirectory() as folder:
    shop = connect(Path(folder, "shop.db"))
    insert(shop, orders(seed=1))
    start = time.perf_counter()
    for turn in range(20):
        insert(shop, orders(seed=turn, count=10))
        for _ in ask(shop, seed=turn, count=5):
            pass
    milliseconds = 1000 * (time.perf_counter() - start)
    shop.close()
print(f"milliseconds: {milliseconds:.2f}")
