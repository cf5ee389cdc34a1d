"""The points that a judge gives a prompt, on average over some cases.

The judge is any command, $JUDGE: it reads a request and prints a number from 0 to 10 on its last
line, say `llm -m MODEL` or `claude -p`. Without it, `rubric.py` looks for words, which needs no
model and no network.
"""

import os
import subprocess
import sys
from pathlib import Path

JUDGE = os.environ.get("JUDGE") or f"{sys.executable} rubric.py"
REQUEST = """\
Here is a prompt for a model that answers a customer. Judge the answers that it would bring: do they
solve the case, rest on rules, say what happens next, and are they short and kind? Print a number
from 0 to 10 as the last line.

<prompt>
{prompt}
</prompt>
"""

template = Path("prompt.md").read_text()
if "{case}" not in template:
    sys.exit("prompt.md has no {case}: the customer's letter has no place in it")
points = []
for case in Path("cases.txt").read_text().splitlines():
    request = REQUEST.replace("{prompt}", template.replace("{case}", case))
    done = subprocess.run(JUDGE, shell=True, input=request, stdout=subprocess.PIPE, text=True)
    answer = done.stdout.strip().rpartition("\n")[2]
    try:
        points.append(min(max(float(answer), 0.0), 10.0))
    except ValueError:
        sys.exit(f"the judge gave no number, but: {answer[:100]!r}")
print(f"points: {sum(points) / len(points):.3f}")
