"""Tensors against the config: shapes, missing and left-over ones, tying; and what is no weights but a delta."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paritykit.audit import audit
from paritykit.testing import TINY_FAMILIES, tiny_model
from tests.checkpoints import Tensors, codes, copied, edit_config, edit_tensors, found, tensors_of

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda family, **config: copied(tiny_model(family, **config), tmp_path / "m")


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(("family", "name", "silent"), [
    ("llama", "model.layers.1.self_attn.k_proj.weight", True),
    ("llama", "model.layers.1.input_layernorm.weight", False),
    ("qwen2", "model.layers.0.self_attn.q_proj.bias", True),
    ("gpt2", "transformer.h.2.ln_1.bias", False),
    ("phi3", "model.layers.2.mlp.gate_up_proj.weight", True),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1.weight", True),
    ("qwen3_moe", "model.layers.2.mlp.experts.5.down_proj.weight", True),
])  # fmt: skip
def test_a_missing_tensor(make: Make, family: str, name: str, silent: bool) -> None:
    folder = make(family)
    edit_tensors(folder, drop(name))
    notice = found(folder, "missing-tensor")
    assert (notice.severity, notice.place) == ("error", name)
    assert notice.vllm.startswith("loads without a word" if silent else "refuses")
    assert codes(audit(folder)) == ["missing-tensor"]


def test_one_notice_for_all_layers(make: Make) -> None:
    folder = make("llama")

    def change(tensors: Tensors) -> None:
        for layer in range(4):
            tensors.pop(f"model.layers.{layer}.mlp.up_proj.weight")

    edit_tensors(folder, change)
    assert "4 tensors, the first model.layers.0.mlp.up_proj.weight" in found(folder, "missing-tensor").message


@pytest.mark.parametrize(("name", "shape", "silent"), [
    ("model.layers.0.self_attn.q_proj.bias", [128], True),
    ("model.layers.0.self_attn.k_norm.weight", [32], False),
    ("model.layers.4.input_layernorm.weight", [96], False),
])  # fmt: skip
def test_a_left_over_tensor(make: Make, name: str, shape: list[int], silent: bool) -> None:
    folder = make("llama")
    edit_tensors(folder, lambda t: t.update({name: torch.ones(shape)}))
    notice = found(folder, "unexpected-tensor")
    assert (notice.severity, notice.place) == ("warning", name)
    assert notice.vllm.startswith("ignores it without a word" if silent else "refuses")


def test_what_transformers_itself_ignores_is_no_notice(make: Make) -> None:
    folder = make("llama")
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    assert codes(audit(folder)) == []


@pytest.mark.parametrize(("family", "key", "value", "place"), [
    ("llama", "intermediate_size", 256, "model.layers.0.mlp.gate_proj.weight"),
    ("llama", "num_key_value_heads", 4, "model.layers.0.self_attn.k_proj.weight"),
    ("llama", "vocab_size", 512, EMBEDDING),
    ("phi3", "num_attention_heads", 8, "model.layers.0.self_attn.qkv_proj.weight"),
    ("mixtral", "intermediate_size", 256, "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ("gpt2", "n_inner", 256, "transformer.h.0.mlp.c_fc.weight"),
])  # fmt: skip
def test_a_shape_that_the_config_does_not_give(make: Make, family: str, key: str, value: int, place: str) -> None:
    folder = make(family)
    edit_config(folder, **{key: value})
    notices = [n for n in audit(folder).notices if n.code == "shape-mismatch"]
    assert place in [n.place for n in notices], notices
    assert {n.severity for n in notices} == {"error"}
    assert "missing-tensor" not in codes(audit(folder))


def test_a_key_that_a_default_replaced_is_named_as_the_cause(make: Make) -> None:
    folder = make("llama")
    edit_config(folder, num_key_value_heads=None)
    notices = [n for n in audit(folder).notices if n.code == "shape-mismatch"]
    assert [n.place for n in notices] == [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ]
    assert "config.json does not give num_key_value_heads, filled with defaults" in notices[0].message
    assert found(folder, "config-default-filled").place == "num_key_value_heads"


def test_a_missing_text_config(tmp_path: Path) -> None:
    folder = multimodal(tmp_path)
    assert codes(audit(folder)) == []
    edit_config(folder, text_config=None)
    notice = found(folder, "text-config-missing")
    assert (notice.severity, notice.place) == ("error", "text_config")
    shapes = [n for n in audit(folder).notices if n.code == "shape-mismatch"]
    assert shapes
    assert all("config.json has no text_config, so all of it was filled with defaults" in n.message for n in shapes)


def multimodal(folder: Path) -> Path:
    """A tiny Gemma 3 that sees: a config in two parts."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = json.loads((tiny_model("gemma3") / "config.json").read_text())
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={k: v for k, v in text.items() if k not in ("architectures", "dtype")},
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.save_pretrained(folder / "m")
    return folder / "m"


def test_tied_and_the_head_is_stored(make: Make) -> None:
    folder = make("llama_tied")
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    notice = found(folder, "tie-mismatch")
    assert (notice.severity, notice.place) == ("note", HEAD)
    assert "they are equal" in notice.message
    assert "were not compared" in found(folder, "tie-mismatch", deep=False).message
    edit_tensors(folder, lambda t: t[HEAD].add_(1))
    notice = found(folder, "tie-mismatch")
    assert (notice.severity, notice.place) == ("error", HEAD)
    assert "they differ" in notice.message
    assert torch.equal(from_pretrained(folder).lm_head.weight, tensors_of(folder)[HEAD])


def test_untied_and_there_is_no_head(make: Make) -> None:
    folder = make("llama")
    edit_tensors(folder, drop(HEAD))
    notice = found(folder, "tie-mismatch")
    assert (notice.severity, notice.place) == ("error", HEAD)
    assert codes(audit(folder)) == ["tie-mismatch"]


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_head_is_stored(make: Make, tied: bool) -> None:
    folder = make("llama", tie_word_embeddings=tied)
    edit_tensors(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    notice = found(folder, "tie-mismatch")
    assert (notice.severity, notice.place) == ("error", EMBEDDING)
    assert notice.hf.startswith("takes the head" if tied else "warns")


def test_neither_embedding_nor_head(make: Make) -> None:
    folder = make("llama_tied")
    edit_tensors(folder, drop(EMBEDDING))
    assert found(folder, "missing-tensor").place == EMBEDDING


@pytest.mark.parametrize("family", [f for f in TINY_FAMILIES if not f.startswith("gemma")])
def test_a_delta_looks_like_one(make: Make, family: str) -> None:
    folder = make(family)
    generator = torch.Generator().manual_seed(0)

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.01

    edit_tensors(folder, change)
    notice = found(folder, "looks-like-delta")
    assert notice.severity == "warning"
    assert "norm" in notice.place or "ln_" in notice.place


def test_a_model_whose_norms_start_at_zero_is_no_delta(make: Make) -> None:
    folder = make("gemma2")
    edit_tensors(folder, lambda t: t.update({n: torch.randn(v.shape) * 0.01 for n, v in t.items() if v.ndim == 1}))
    assert codes(audit(folder)) == []


def test_a_norm_that_is_small_but_of_one_sign_is_no_delta(make: Make) -> None:
    folder = make("llama")
    edit_tensors(folder, lambda t: t.update({n: v * 1e-3 for n, v in t.items() if v.ndim == 1}))
    assert codes(audit(folder)) == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_base_proves_a_delta(make: Make, tmp_path: Path, family: str) -> None:
    base = tiny_model(family)
    assert codes(audit(base, base=base)) == []
    assert found(base, "equals-base", base=base).severity == "note"
    folder = make(family)
    edit_tensors(folder, lambda t: t.update({n: v + 0.02 * torch.randn(v.shape) for n, v in t.items()}))
    assert codes(audit(folder, base=base)) == []
    own = tensors_of(base)
    edit_tensors(folder, lambda t: t.update({n: v - own[n] for n, v in t.items()}))
    notice = found(folder, "is-delta", base=base)
    assert notice.severity == "error"
    assert "loads it as weights" in notice.vllm


def test_a_base_with_values_that_are_no_numbers(make: Make) -> None:
    folder = make("llama")
    edit_tensors(folder, lambda t: t[EMBEDDING].fill_(float("inf")))
    assert codes(audit(tiny_model("llama"), base=folder)) == []


def test_a_base_that_is_another_model(make: Make) -> None:
    assert found(tiny_model("llama"), "base-unrelated", base=tiny_model("llama", seed=1)).severity == "note"
    assert found(tiny_model("llama"), "base-unrelated", base=tiny_model("gpt2")).severity == "note"


def test_a_checkpoint_in_the_form_of_fused_experts(make: Make, tmp_path: Path) -> None:
    """Transformers 5 takes both forms; what it takes is no fault."""
    folder = make("mixtral")
    tensors = tensors_of(folder)
    model = from_pretrained(folder)
    fused = {n: t.contiguous() for n, t in model.state_dict().items()}
    assert set(fused) != set(tensors)
    save_file(fused, folder / "model.safetensors", {"format": "pt"})
    assert codes(audit(folder)) == []


def from_pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
