"""Whether the prompt is one for customers: of a bounded length, and without a word to the judge."""

import re
import sys
from pathlib import Path

MOST = 200  # words
prompt = Path("prompt.md").read_text()
if (count := len(prompt.split())) > MOST:
    sys.exit(f"prompt.md has {count} words, and {MOST} are the most")
if found := re.search(
    r"\b(judge|score|points|rubric|rating|out of 10|10/10)\b", prompt, re.IGNORECASE
):
    sys.exit(f"prompt.md speaks to the judge: {found[0]!r}")
