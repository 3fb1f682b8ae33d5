"""What the audit says of vLLM is what vLLM does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from paritykit.audit.folder import Folder
from paritykit.audit.loaders import vllm_choice
from paritykit.errors import EngineError
from paritykit.testing import tiny_model
from tests.audit_folders import FOLDERS, make_folder
from tests.checkpoints import copied, edit_tensors, found, sharded, tensors_of
from tests.integration.conftest import Bench

ROOT = Path(__file__).parents[2]
Ask = Callable[[Path], list[str] | None]


@pytest.fixture(scope="module")
def vllm_files() -> Iterator[Ask]:
    pytest.importorskip("vllm", reason="needs vllm")
    command = [sys.executable, "-m", "tests.integration.vllm_files"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "CRITICAL"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as child:
        assert child.stdin
        assert child.stdout
        into, out = child.stdin, child.stdout

        def ask(folder: Path) -> list[str] | None:
            into.write(f"{folder}\n")
            into.flush()
            answer: list[str] | None = json.loads(out.readline())
            return answer

        yield ask
        into.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(FOLDERS)
def test_vllm_reads_what_we_say(vllm_files: Ask, tmp_path: Path, layout: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / uuid4().hex, layout)  # vLLM remembers what it saw under a name
    facts = Folder(folder)
    ours = vllm_choice(facts.names, facts.indexes)
    theirs = vllm_files(folder)
    shutil.rmtree(folder)
    assert theirs == (None if ours.fails else list(ours.files)), ours


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def judged(bench: Bench, folder: Path) -> str:
    return bench.compare(folder, checks=["logits"]).summary.verdict


def test_a_single_file_beside_shards_makes_two_models(bench: Bench, tmp_path: Path) -> None:
    folder = copied(tiny_model("llama", num_hidden_layers=2), tmp_path / "single-beside-sharded")
    tensors = tensors_of(sharded(folder))
    save_file({**tensors, HEAD: tensors[HEAD] + 1}, folder / "model.safetensors", {"format": "pt"})
    assert found(folder, "single-beside-sharded").severity == "error"
    assert judged(bench, folder) == "fail"


def test_a_stored_head_that_should_be_tied_is_used_by_both(bench: Bench, tmp_path: Path) -> None:
    folder = copied(tiny_model("llama_tied", num_hidden_layers=2), tmp_path / "stored-head")
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING].flip(0).contiguous()}))
    notice = found(folder, "tie-mismatch")
    assert (notice.severity, notice.vllm.split(";")[0]) == ("error", "computes logits with the stored head")
    assert notice.hf.startswith("computes logits with the stored head")
    assert judged(bench, folder) == "pass"


def test_a_tensor_without_a_place_is_refused(bench: Bench, tmp_path: Path) -> None:
    folder = copied(tiny_model("llama", num_hidden_layers=2), tmp_path / "left-over")
    name = "model.layers.0.self_attn.k_norm.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(32)}))
    assert found(folder, "unexpected-tensor").vllm.startswith("refuses")
    with pytest.raises(EngineError, match=r"no module or parameter named 'layers\.0\.self_attn\.k_norm'"):
        bench.candidate(folder, bench.reference(folder))
