"""train.py, and what an agent might make of it, compiled for GPUs that are not here; see card.py.

CARDS=4090,5090 uv run pytest tests/gpu      or CARDS=all, for others than these two
"""

import os
from pathlib import Path

import pytest
from card import CARDS, ROOT, compile_for, missing

DEPTH = "DEPTH         = pick(2, GPU[0])"
EDITS = {
    "MICRO_BATCH   = 2**17": "MICRO_BATCH   = BATCH // 2",
    "NGRAMS        = (2, 3)": "NGRAMS        = ()",
    "F.relu(linear(x, self.up) - MLP_SHIFT).square()": "F.gelu(linear(x, self.up))",
    "SOFTCAP * torch.tanh(linear(h, self.head).float() / SOFTCAP_KNEE)": "norm(linear(h, self.head).float()) * 5",
}
NAMED = os.environ.get("CARDS", "H100,3060")
TRIED = [*CARDS] if NAMED == "all" else NAMED.split(",")

pytestmark = [
    pytest.mark.skipif(missing() != "", reason=missing()),
    pytest.mark.timeout(900),
    pytest.mark.slow,
]


def changed(edits: dict[str, str]) -> str:
    source = (ROOT / "train.py").read_text()
    for old, new in edits.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("card", TRIED)
def test_train_compiles(card: str, tmp_path: Path) -> None:
    """No graph break, nothing compiled in the second step, every kernel a cubin, and the whole batch fits the card."""
    figures = compile_for(card, tmp_path, changed({}))
    assert figures["kernels"] > 50 and figures["products"] > 50  # so that this compiled
    if card == "H100":  # docs/notebook.md has the figures
        assert figures["micro_rows"] == 64
        assert figures["kernels"] < 220 and figures["GB"] < 80 and figures["peak_GiB"] < 26


@pytest.mark.parametrize("card", TRIED[1:] or TRIED)
def test_an_edited_train_compiles(card: str, tmp_path: Path) -> None:
    """Another depth, activation and squeeze, no tables, and two micro-batches."""
    figures = compile_for(card, tmp_path, changed(EDITS | {DEPTH: "DEPTH = 2"}))
    assert figures["kernels"] > 50


def test_a_break_in_the_graph_is_told(tmp_path: Path) -> None:
    documents = "        documents = documents_of("
    edits = EDITS | {DEPTH: "DEPTH = 1", documents: f"        print('broken')\n{documents}"}
    with pytest.raises(RuntimeError, match="Unsupported"):
        compile_for("3060", tmp_path, changed(edits))
