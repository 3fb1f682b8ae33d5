"""config.json: keys nobody reads, keys filled by defaults, rotary settings given twice, and splitting over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from paritykit.audit import Notice, audit, reads
from paritykit.testing import TINY_FAMILIES, tiny_model
from tests.checkpoints import codes, copied, edit_config, found

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda family="llama", **config: copied(tiny_model(family, **config), tmp_path / "m")


def rope(folder: Path) -> dict[str, Any]:
    """What transformers makes of the rotary settings."""
    found: dict[str, Any] = AutoConfig.from_pretrained(folder).rope_parameters
    return found


def test_a_key_nobody_reads(make: Make) -> None:
    folder = make()
    edit_config(folder, my_private_key=3)
    notice = found(folder, "config-key-unread")
    assert (notice.severity, notice.place) == ("note", "my_private_key")
    assert "my_private_key = 3" in notice.message


@pytest.mark.parametrize(("wrong", "right"), [
    ("rms_norm_epsilon", "rms_norm_eps"),
    ("num_key_value_head", "num_key_value_heads"),
    ("tie_word_embedding", "tie_word_embeddings"),
])  # fmt: skip
def test_a_misspelt_key(make: Make, wrong: str, right: str) -> None:
    folder = make()
    value = json.loads((folder / "config.json").read_text())[right]
    edit_config(folder, **{right: None, wrong: value})
    notice = found(folder, "config-key-unread")
    assert (notice.severity, notice.place) == ("warning", wrong)
    assert f"did you mean {right!r}" in notice.message


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_key_of_a_saved_config_is_read(family: str) -> None:
    assert not {"config-key-unread", "config-key-vllm-only"} & {n.code for n in audit(tiny_model(family)).notices}


def test_without_vllm_only_transformers_was_looked_at(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "package", lambda name: None if name == "vllm" else whole(name))
    folder = make()
    edit_config(folder, my_private_key=3)
    notice = found(folder, "config-key-unread")
    assert (notice.vllm, "vLLM is not installed" in notice.message) == ("was not looked at", True)


whole = reads.package


def test_a_key_that_a_default_fills(make: Make) -> None:
    folder = make()
    edit_config(folder, rms_norm_eps=None)
    notice = found(folder, "config-default-filled")
    assert (notice.severity, notice.place) == ("note", "rms_norm_eps")
    assert "fills in 1e-06" in notice.message
    edit_config(folder, rope_parameters=None)
    assert {"rms_norm_eps", "rope_parameters"} <= places(folder, "config-default-filled")


def test_a_key_under_its_other_name_is_given() -> None:
    assert not places(tiny_model("gpt2"), "config-default-filled")


def test_a_config_that_no_model_comes_from(make: Make) -> None:
    folder = make()
    edit_config(folder, num_hidden_layers="many")
    notice = found(folder, "config-refused")
    assert (notice.severity, notice.hf) == ("error", "fails to load")
    assert "num_hidden_layers" in notice.message


@pytest.mark.parametrize("kind", ["nobody_knows", None])
def test_a_model_type_that_nobody_knows(make: Make, kind: str | None) -> None:
    folder = make()
    edit_config(folder, model_type=kind)
    notice = found(folder, "model-unknown")
    assert (notice.severity, notice.place) == ("error", "model_type")


def test_code_that_comes_with_the_model_is_not_run(make: Make, tmp_path: Path) -> None:
    folder = make()
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Own: pass\nclass Model: pass\n")
    assert found(folder, "remote-code").severity == "note"
    assert not (tmp_path / "owned").exists()


def test_a_quantized_checkpoint_says_what_was_not_audited(make: Make) -> None:
    folder = make()
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    assert found(folder, "quantized").severity == "note"
    assert codes(audit(folder)) == []


def test_two_names_for_two_models(make: Make) -> None:
    folder = make()
    edit_config(folder, architectures=["Qwen2ForCausalLM"])
    notice = found(folder, "architecture-mismatch")
    assert (notice.severity, notice.place, notice.hf) == ("error", "architectures", "builds LlamaForCausalLM")


@pytest.mark.skipif(reads.package("vllm") is None, reason="needs vllm")
def test_two_names_for_one_model_of_vllm(make: Make) -> None:
    folder = make()
    edit_config(folder, architectures=["LLaMAForCausalLM"])
    assert codes(audit(folder)) == []
    edit_config(folder, architectures=["NobodyKnowsForCausalLM"])
    assert found(folder, "architecture-mismatch").severity == "warning"


def test_rope_theta_twice(make: Make) -> None:
    folder = make()
    edit_config(folder, rope_theta=5000.0)
    assert found(folder, "rope-both-names").severity == "note"
    edit_config(folder, rope_theta=10000.0)
    notice = found(folder, "rope-both-names")
    assert (notice.severity, notice.place) == ("error", "rope_theta")
    assert "rope_theta is 10000.0 and rope_parameters says 5000.0" in notice.message
    assert str(rope(folder)) in notice.hf
    assert rope(folder)["rope_theta"] == 5000.0


def test_rope_scaling_twice(make: Make) -> None:
    folder = make()
    scaling = {"rope_type": "linear", "factor": 4.0}
    edit_config(
        folder, rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters={**scaling, "rope_theta": 5000.0}
    )
    assert found(folder, "rope-both-names").severity == "note"
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    notice = found(folder, "rope-both-names")
    assert (notice.severity, notice.place) == ("error", "rope_scaling")
    assert str(rope(folder)) in notice.hf
    assert rope(folder)["rope_type"] == "linear"


def test_rope_by_layer_type_twice(make: Make) -> None:
    folder = make("gemma3")
    edit_config(folder, rope_local_base_freq=5000.0)
    assert found(folder, "rope-both-names").severity == "note"
    edit_config(folder, rope_local_base_freq=7000.0)
    notice = found(folder, "rope-both-names")
    assert (notice.severity, notice.place) == ("error", "rope_local_base_freq")


def test_old_names_alone_are_no_fault(make: Make) -> None:
    folder = make()
    edit_config(folder, rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert codes(audit(folder)) == []
    assert not places(folder, "rope-both-names")
    assert rope(folder) == {"type": "linear", "factor": 2.0, "rope_theta": 5000.0, "rope_type": "linear"}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_two_types_in_one_block(make: Make, key: str) -> None:
    folder = make()
    block = {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    edit_config(folder, rope_parameters=None)
    edit_config(folder, **{key: block})
    assert codes(audit(folder)) == []
    edit_config(folder, **{key: {**block, "rope_type": "dynamic"}})
    notice = found(folder, "rope-type-conflict")
    assert (notice.severity, notice.place) == ("error", key)
    assert rope(folder)["rope_type"] == "dynamic"
    edit_config(folder, **{key: {**block, "type": "su", "rope_type": "longrope"}})
    assert not places(folder, "rope-type-conflict")


@pytest.mark.parametrize(("config", "size", "code", "severity", "place"), [
    ({}, 3, "tp-heads", "error", "num_attention_heads"),
    ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "tp-kv-heads", "error", "num_key_value_heads"),
    ({}, 4, "tp-kv-copies", "note", "num_key_value_heads"),
    ({"intermediate_size": 190}, 4, "tp-width", "error", "intermediate_size"),
    ({}, 2, "tp-vocabulary", "note", "vocab_size"),
    ({"num_attention_heads": 12, "num_key_value_heads": 3}, 3, "tp-vocabulary", "error", "vocab_size"),
])  # fmt: skip
def test_sizes_that_do_not_split(config: Any, size: int, code: str, severity: str, place: str) -> None:
    folder = tiny_model("llama", **config)
    notice = found(folder, code, tensor_parallel_size=size)
    assert (notice.severity, notice.place) == (severity, place)
    assert not [n for n in audit(folder).notices if n.code.startswith("tp-")]


def test_a_hidden_size_that_does_not_split() -> None:
    notice = found(tiny_model("qwen3", hidden_size=98), "tp-hidden", tensor_parallel_size=4)
    assert (notice.severity, notice.place) == ("warning", "hidden_size")


def test_sizes_of_a_config_by_its_own_names() -> None:
    assert (
        found(tiny_model("gpt2"), "tp-heads", tensor_parallel_size=3).message
        == "4 attention heads do not split over 3 ranks"
    )
    assert (
        found(tiny_model("opt"), "tp-width", tensor_parallel_size=3).message
        == "ffn_dim 320 does not split over 3 ranks"
    )


def test_the_model_that_is_built_without_weights_is_the_one_that_is_loaded() -> None:
    from paritykit.audit.folder import Folder

    for family in ("llama", "mixtral", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
        assert Folder(tiny_model(family)).model.class_name == type(model).__name__


def places(folder: Path, code: str) -> set[str]:
    return {n.place for n in notices(folder, code)}


def notices(folder: Path, code: str) -> list[Notice]:
    return [n for n in audit(folder).notices if n.code == code]
