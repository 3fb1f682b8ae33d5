"""A good checkpoint gives no error and no warning, however it was saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from paritykit.audit import audit
from paritykit.errors import UsageError
from paritykit.testing import TINY_FAMILIES, tiny_model
from tests.checkpoints import codes, copied, edit_config, edit_tensors


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("shard", [None, "50kB"])
def test_a_clean_checkpoint(family: str, shard: str | None, tmp_path: Path) -> None:
    folder = tiny_model(family)
    if shard:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size=shard)
        folder = tmp_path
        assert len(list(folder.glob("*.safetensors"))) > 3
    done = audit(folder, tensor_parallel_size=2)
    assert codes(done) == [], [n for n in done.notices if n.severity != "note"]
    assert done.clean
    assert (done.tensors > 20, done.bytes > 1_000_000, done.deep) == (True, True, True)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_clean_in_other_dtypes_and_ties(family: str, dtype: str, tied: bool) -> None:
    assert codes(audit(tiny_model(family, dtype=dtype, tie_word_embeddings=tied))) == []


def test_a_base_model_saved_without_the_prefix(tmp_path: Path) -> None:
    folder = copied(tiny_model("llama_tied"), tmp_path / "m")

    def strip(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    assert codes(audit(folder)) == []


def test_headers_only_reads_no_data(tmp_path: Path) -> None:
    folder = copied(tiny_model("qwen2"), tmp_path / "m")
    edit_tensors(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert codes(audit(folder, deep=False)) == []
    assert "nonfinite" in codes(audit(folder))


def test_progress_ends_at_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    done = audit(tiny_model("qwen2"), progress=lambda *step: seen.append(step))
    assert len(seen) == done.tensors
    assert seen[0][0] == "audit model.safetensors"
    assert 0.99 * done.bytes < seen[-1][1] <= seen[-1][2] == done.bytes


def test_no_notice_tells_where_the_folder_is(tmp_path: Path) -> None:
    folder = copied(tiny_model("qwen2"), tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": "wide"}))
    (folder / "extra.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_bytes(b"{")
    for notice in audit(folder).notices:
        assert str(tmp_path) not in "".join(str(getattr(notice, f)) for f in notice.__struct_fields__)


@pytest.mark.parametrize(("make", "said"), [
    (lambda p: None, "no such folder"),
    (lambda p: p.write_text("x"), "is a file; give the checkpoint's folder"),
    (lambda p: p.mkdir(), "is not a checkpoint: it has no config.json"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text("{}")), "it has no .safetensors, .bin or .pt weights"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text("{"), (p / "a.bin").touch()), "cannot be read"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text("[]"), (p / "a.bin").touch()), "is not a JSON object"),
    (lambda p: (p.mkdir(), (p / "config.json").write_bytes(b"\xff"), (p / "a.bin").touch()), "cannot be read"),
])  # fmt: skip
def test_what_is_no_checkpoint(make: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path / "m")
    with pytest.raises(UsageError, match=said):
        audit(tmp_path / "m")
    with pytest.raises(UsageError, match=said):
        audit(tiny_model("qwen2"), base=tmp_path / "m")


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    folder = copied(tiny_model("qwen2"), tmp_path / "m")

    def cut(*step: object) -> None:
        (folder / "model.safetensors").write_bytes(b"")

    with pytest.raises(UsageError, match="changed or could not be read"):
        audit(folder, progress=cut)


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="neither a folder nor a hub model that can be reached"):
        audit("nobody/nothing-here")


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_is_none(size: int) -> None:
    with pytest.raises(UsageError, match="tensor_parallel_size must be at least 1"):
        audit(tiny_model("qwen2"), tensor_parallel_size=size)


def test_the_import_is_light(tmp_path: Path) -> None:
    heavy = "'torch', 'transformers', 'vllm', 'numpy'"
    script = f"import sys, paritykit.audit\nassert not {{{heavy}}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_the_worst_comes_first(tmp_path: Path) -> None:
    folder = copied(tiny_model("qwen2"), tmp_path / "m")
    edit_config(folder, hidden_size=64, hidden_act=None, hiden_act="gelu")
    severities = [n.severity for n in audit(folder).notices]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert {"error", "warning", "note"} == set(severities)
