"""train.py as an agent might change it, compiled for GPUs that are not here; see test_cards.py."""

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
NAMED = os.environ.get("CARDS", "3060")
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
def test_an_edited_train_compiles(card: str, tmp_path: Path) -> None:
    """Another depth, activation and squeeze, no tables, and two micro-batches."""
    figures = compile_for(card, tmp_path, changed(EDITS | {DEPTH: "DEPTH = 2"}))
    assert figures["kernels"] > 50


def test_a_break_in_the_graph_is_told(tmp_path: Path) -> None:
    documents = "        documents, later = documents_of("
    edits = EDITS | {DEPTH: "DEPTH = 1", documents: f"        print('broken')\n{documents}"}
    with pytest.raises(RuntimeError, match="Unsupported"):
        compile_for("3060", tmp_path, changed(edits))
