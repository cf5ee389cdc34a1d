"""How many comparisons it takes to sort 20 lists."""

import random

from sort import sort


class Item:
    compared = 0

    def __init__(self, value):
        self.value = value

    def __lt__(self, other):
        Item.compared += 1
        return self.value < other.value


rng = random.Random(1)
for _ in range(20):
    sort([Item(rng.random()) for _ in range(200)])
print(f"comparisons: {Item.compared}")
