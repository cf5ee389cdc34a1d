"""Whether lists that `measure.py` has not seen come out sorted.

In a process of its own: `sort.py` is edited by an agent, and could end this one before it looks.
"""

import json
import random
import subprocess
import sys

CHILD = """
import json, sys
from sort import sort
lists = json.load(sys.stdin)
for numbers in lists:
    sort(numbers)
json.dump(lists, sys.stdout)
"""

rng = random.Random(2)
lists = [[rng.randrange(50) for _ in range(size)] for size in range(60)]
command = [sys.executable, "-c", CHILD]
done = subprocess.run(command, input=json.dumps(lists), stdout=subprocess.PIPE, text=True)
try:
    found = json.loads(done.stdout)
except ValueError:
    raise SystemExit("sort.py gave no lists back") from None
if found != [sorted(numbers) for numbers in lists]:
    raise SystemExit("a list came out unsorted")
