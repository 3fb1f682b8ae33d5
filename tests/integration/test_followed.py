"""Real vLLM's loading, followed: published shapes that no sibling could be made for, on one rank and on three."""

from __future__ import annotations

from pathlib import Path

import pytest

from paritykit.cli import execute
from paritykit.testing import tiny_model

pytestmark = pytest.mark.deep
SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama32-3b": {"hidden_size": 768, "intermediate_size": 1536, "num_attention_heads": 24, "num_key_value_heads": 8},
    "qwen3-14b": {"hidden_size": 640, "intermediate_size": 1280, "num_attention_heads": 40, "num_key_value_heads": 8},
}


@pytest.mark.parametrize(("shape", "ranks"), [("smollm2", 1), ("smollm2", 3), ("llama32-3b", 2), ("qwen3-14b", 1)])
def test_a_published_shape_has_a_ledger(
    shape: str, ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**SHAPES[shape], "num_hidden_layers": 1, "head_dim": 64, "vocab_size": 32771}
    made = tiny_model("llama_tied", tmp_path / "m", dtype="bfloat16", **config)
    code = execute(["weights", str(made), "--candidate", "vllm", "--tensor-parallel-size", str(ranks)])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "weights pass" in said.out
