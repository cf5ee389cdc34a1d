"""The verdict, case by case."""

import pytest
from conftest import TASK


@pytest.mark.parametrize(
    ("score", "lines", "incumbent", "best", "better"),
    [
        (1.0, 0, None, None, True),  # the baseline
        (0.9, 50, 1.0, 1.0, True),  # better, at any length
        (0.9997, 5, 1.0, 1.0, True),  # better by more than a tie
        (0.9998, 0, 1.0, 1.0, False),  # a tie that removes nothing
        (0.9998, 5, 1.0, 1.0, False),  # a tie that adds
        (0.9998, -1, 1.0, 1.0, True),  # a tie that removes lines, on the better side
        (1.0, -1, 1.0, 1.0, True),  # equal and simpler
        (1.0002, -1, 1.0, 1.0, True),  # the edge of a tie, in spite of binary fractions
        (1.000201, -9, 1.0, 1.0, False),  # just worse
        (1.0001, -9, 1.0, 0.9998, False),  # ties with the incumbent, but drifts from the best ever
        (1.0, -9, 1.0, 0.9998, True),  # ... and not
        (1.1, -500, 1.0, 1.0, False),  # worse, however short
    ],
)
def test_is_better(
    score: float, lines: int, incumbent: float | None, best: float | None, better: bool
) -> None:
    assert TASK.is_better(score, lines, incumbent, best) == better
