"""An agent with a script: what it does in each experiment of the golden night, by the experiment and the call."""

import os
import re
import sys
from pathlib import Path

number = int(os.environ["AUTORESEARCH_EXPERIMENT"])
calls = Path(os.environ["GOLDEN"]) / f"{number:04d}"
call = len(calls.read_text()) if calls.exists() else 0
calls.write_text("x" * (call + 1))
train = Path("train.py")


def score(value: float, more: str = "") -> None:
    train.write_text(
        re.sub(r"^VAL_BPB = [\d.]+", f"VAL_BPB = {value}", train.read_text(), flags=re.M) + more
    )


def say(idea: str) -> None:
    print(f"It is worth a try: {idea}.\n\n{idea}")


def mend(value: float) -> None:
    """Drop whatever the last call appended."""
    train.write_text(re.sub(r"^(raise .*|def \(|LATE = .*)\n", "", train.read_text(), flags=re.M))
    score(value)


match number, call:
    case 1, _:
        score(0.95)
        say("better")
    case 2, _:
        score(0.97, "WORSE = 1\n")
        say("worse")
    case 3, _:
        score(0.9501)
        train.write_text(train.read_text().replace("EXTRA = 0\n", "", 1))
        say("a tie that removes a line")
    case 4, 0:
        score(0.93, "raise ValueError('first')\n")
        say("crashes once")
    case 4, _:
        mend(0.93)
        say("repaired")
    case 5, _:
        train.write_text(re.sub(r"^raise .*\n", "", train.read_text(), flags=re.M))
        score(0.92, f"raise ValueError('again {call}')\n")
        say("crashes for good")
    case 6, 0:
        score(0.92, "def (\n")
        say("does not compile")
    case 6, _:
        sys.exit("no idea how to mend it")
    case 7, 0:
        score(0.92, "import time; time.sleep(1000)\n")
        say("takes too long")
    case 8, _:
        score(0.9)
        with Path("prepare.py").open("a") as file:
            file.write("# easier\n")
        say("changes another file")
    case 9, _:
        score(0.9)
        Path("notes.txt").write_text("mine\n")
        say("adds a file")
    case 10, 0:
        say("changes nothing")
    case 10, _:
        score(0.94, "TEN = 1\n")
        say("something, at last")
    case 11, 0:
        score(0.97, "WORSE = 1\n")
        text = train.read_text().replace("EXTRA = 0\n", "EXTRA = 0\nEXTRA = 0\n", 1)
        train.write_text(f"# the second experiment once more\n{text}")
        say("a program that was tried")
    case 11, _:
        score(0.96, "ELEVEN = 1\n")
        say("another program")
    case 12, 0:
        sys.exit("API Error: 529 Overloaded")
    case 12, _:
        score(0.91)
        say("the service is back")
    case 13, 0:
        score(
            0.9,
            "import os, time\nopen(os.environ['TMPDIR'] + '/training', 'w').close()\ntime.sleep(1000)\n",
        )
        say("the driver is killed while this trains")
    case 13, _:
        score(0.9)
        say("the driver is back")
    case _:
        score(0.99, f"X = {number}\n")
        say("one more")
