"""What the vLLM engine promises before it starts; nothing of vLLM is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paritykit.testing import tiny_model


@pytest.mark.parametrize(("arguments", "traced"), [
    ({}, True),
    ({"provenance": False}, False),
    ({"load_format": "dummy"}, False),
    ({"quantization": "fp8"}, False),
])  # fmt: skip
def test_a_loader_that_is_not_ours_to_watch_promises_no_ledger(arguments: dict[str, Any], *, traced: bool) -> None:
    assert ("ledger" in vllm_engine(tiny_model("qwen2"), **arguments).capabilities) == traced


def test_building_the_engine_imports_no_vllm() -> None:
    """Without vLLM it is built all the same, and says on opening what is missing."""
    code = f"from paritykit.engines.vllm.engine import VllmEngine as E; E({str(tiny_model('qwen2'))!r}); import sys; "
    answer = subprocess.run(
        [sys.executable, "-c", code + "print('vllm' in sys.modules)"], capture_output=True, check=True
    )
    assert answer.stdout.split() == [b"False"]


def test_a_quantised_checkpoint_promises_no_ledger(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "ledger" not in vllm_engine(folder).capabilities


def vllm_engine(model: Path, **arguments: Any) -> Any:
    from paritykit.engines.vllm.engine import VllmEngine

    return VllmEngine(str(model), **arguments)
