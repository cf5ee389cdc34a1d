"""train.py compiled for GPUs that are not here; see card.py.

CARDS=4090,5090 uv run pytest tests/gpu      or CARDS=all, for others than an H100, and in test_edits.py a 3060
"""

import os
from pathlib import Path

import pytest
from card import CARDS, ROOT, compile_for, missing

NAMED = os.environ.get("CARDS", "H100")
TRIED = [*CARDS] if NAMED == "all" else NAMED.split(",")

pytestmark = [
    pytest.mark.skipif(missing() != "", reason=missing()),
    pytest.mark.timeout(900),
    pytest.mark.slow,
]


@pytest.mark.parametrize("card", TRIED)
def test_train_compiles(card: str, tmp_path: Path) -> None:
    """No graph break, nothing compiled in the second step, every kernel a cubin, and the whole batch fits the card."""
    figures = compile_for(card, tmp_path, (ROOT / "train.py").read_text())
    assert figures["kernels"] > 50 and figures["products"] > 50  # so that this compiled
    if card == "H100":  # docs/notebook.md has the figures
        assert figures["micro_rows"] == 64
        assert figures["kernels"] < 220 and figures["GB"] < 80 and figures["peak_GiB"] < 26
