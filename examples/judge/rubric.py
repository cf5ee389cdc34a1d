"""A judge without a model: two points for each thing that the prompt asks of an answer."""

import re
import sys

RUBRIC = {
    "solves the case": r"\b(solve|solution|offer|refund|replace)",
    "rests on rules": r"\b(rule|policy|policies|terms)\b",
    "says what happens next": r"\bnext (step|steps)\b|\bhappens next\b|\bby when\b",
    "is short": r"\b(short|brief|sentences|words)\b",
    "is kind": r"\b(kind|kindly|friendly|warm|apologi[sz]e|sorry)\b",
}

prompt = re.search(r"<prompt>(.*)</prompt>", sys.stdin.read(), re.DOTALL)
text = prompt[1].lower() if prompt else ""
print(sum(2 for pattern in RUBRIC.values() if re.search(pattern, text)))
