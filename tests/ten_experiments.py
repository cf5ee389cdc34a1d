"""Ten experiments of every kind, scripted once, to be made through any agent.

python tests/ten_experiments.py plan.json < prompt      the plain command: edits ./train.py as the plan says
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from model_server import Change, Move, Say, Script

Plan = dict[
    str, tuple[str, str] | None
]  # "4 idea", "4 mend", "4 again" -> the old and the new line; None: no edit


@dataclass(frozen=True)
class Idea:
    """Set a constant, and what becomes of it. `mend` is the value that a crash is mended with, `again` the line that is
    tried where the first one is refused as a repetition."""

    constant: str
    value: str
    status: str
    mend: str | None = None
    again: tuple[str, str] | None = None


QUICK = (
    Idea("VAL_BPB", "0.9", "keep"),
    Idea("VAL_BPB", "0.95", "discard"),
    Idea("VAL_BPB", "0.95", "discard", again=("VAL_BPB", "0.96")),
    Idea("VAL_BPB", "1 / 0", "crash"),
    Idea("VAL_BPB", "none", "keep", mend="0.8"),
    Idea("VAL_BPB", "0.8001", "discard"),
    Idea("VAL_BPB", "float('nan')", "crash"),
    Idea("VAL_BPB", "0.79985", "discard"),
    Idea("VAL_BPB", "float('inf')", "keep", mend="0.75"),
    Idea("VAL_BPB", "0.7", "keep"),
)
# Of train.py as it is, on the demo arena: effects so large that no noise turns a decision
SLOW = {
    "HEAD_LR": "0.00005",
    "EMBEDDING_LR": "0.001",
    "MATRIX_LR": "0.0005",
    "SOFTCAP": "2.0",
}  # the baseline's
DEMO = (
    Idea("HEAD_LR", "0.004", "keep"),
    Idea("HEAD_LR", "0.00001", "discard"),
    Idea("HEAD_LR", "0.00001", "discard", again=("HEAD_LR", "0.00002")),
    Idea("SOFTCAP", "16.5", "keep"),
    Idea("EMBEDDING_LR", "'fast'", "keep", mend="0.6"),
    Idea("HEAD_LR", "0.00003", "discard"),
    Idea("SOFTCAP", "0.5", "discard"),
    Idea("DEPTH", "'two'", "crash"),
    Idea("MATRIX_LR", "0.03", "keep"),
    Idea("MATRIX_LR", "0.0004", "discard"),
)


def put(text: str, constant: str, value: str) -> tuple[str, tuple[str, str]]:
    """Set a constant of a program. Returns the program, and the line before and after."""
    old = re.findall(rf"^{constant} +=.*$", text, re.MULTILINE)[0]
    new = f"{constant} = {value}"
    return text.replace(old, new, 1), (old, new)


def plan(text: str, ideas: tuple[Idea, ...]) -> Plan:
    """The edits that the ideas come to, one after the other, if each of them ends as it says."""
    edits: Plan = {}
    for number, idea in enumerate(ideas, start=1):
        program, edits[f"{number} idea"] = put(text, idea.constant, idea.value)
        edits[f"{number} mend"] = edits[f"{number} again"] = None
        if idea.mend:
            program, edits[f"{number} mend"] = put(program, idea.constant, idea.mend)
        if idea.again:
            program, edits[f"{number} again"] = put(text, *idea.again)
        text = program if idea.status == "keep" else text
    return edits


def wanted(prompt: str) -> str:
    """Which edit of the plan a prompt asks for."""
    number = re.findall(r"This is experiment (\d+)", prompt)[-1]
    return f"{number} {'mend' if 'crashed: ' in prompt else 'again' if '# Your last call' in prompt else 'idea'}"


def script(edits: Plan) -> Script:
    """The plan as the moves of a model."""

    def move(prompt: str, turn: int) -> Move:
        edit = edits[wanted(prompt)]
        return (
            Change("train.py", *edit)
            if edit and turn == 0
            else Say(f"Because.\n\nidea {wanted(prompt)}")
        )

    return move


def main() -> None:
    prompt, path = sys.stdin.read(), Path("train.py")
    if edit := json.loads(Path(sys.argv[1]).read_text())[wanted(prompt)]:
        path.write_text(path.read_text().replace(*edit, 1))
    print(f"Because.\n\nidea {wanted(prompt)}")


if __name__ == "__main__":
    main()
