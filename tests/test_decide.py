"""The verdict, case by case."""

import pytest

from autoresearch.records import Crashed, Finished, Killed, Outcome, Rejected, Summary
from loop import decide


def scored(val_bpb: float) -> Finished:
    return Finished(Summary(val_bpb, val_bpb, 300.0, 320.0, 45000.0, None, 500.0, 950, 50.0, 8, 3.0), 320.0)


@pytest.mark.parametrize(
    ("outcome", "lines", "incumbent", "best", "verdict"),
    [
        (scored(1.0), 0, None, None, "keep"),  # the baseline
        (scored(0.9), 50, 1.0, 1.0, "keep"),  # better, at any length
        (scored(0.9997), 5, 1.0, 1.0, "keep"),  # better by more than a tie
        (scored(0.9998), 0, 1.0, 1.0, "discard"),  # a tie that removes nothing
        (scored(0.9998), 5, 1.0, 1.0, "discard"),  # a tie that adds
        (scored(0.9998), -1, 1.0, 1.0, "keep"),  # a tie that removes lines, on the better side
        (scored(1.0), -1, 1.0, 1.0, "keep"),  # equal and simpler
        (scored(1.0002), -1, 1.0, 1.0, "keep"),  # the edge of a tie, in spite of binary fractions
        (scored(1.000201), -9, 1.0, 1.0, "discard"),  # just worse
        (scored(1.0001), -9, 1.0, 0.9998, "discard"),  # a tie with the incumbent, but drifting from the best ever
        (scored(1.0), -9, 1.0, 0.9998, "keep"),  # ... and not
        (scored(1.1), -500, 1.0, 1.0, "discard"),  # worse, however short
        (Crashed("boom", "", 3.0), -5, 1.0, 1.0, "crash"),
        (Killed("at the limit of 600 s", 600.0), -5, 1.0, 1.0, "crash"),
        (Rejected(("prepare.py",)), -5, 1.0, 1.0, "crash"),
    ],
)
def test_decide(outcome: Outcome, lines: int, incumbent: float | None, best: float | None, verdict: str) -> None:
    assert decide(outcome, lines, incumbent, best) == verdict
