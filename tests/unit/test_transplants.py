"""The law of transplants on tiny Llamas: the same function in every family, and another where a rewrite is left out.

Two computations of one function in float32 differ by rounding. How much that is here, the original says itself: its
own error against float64. Two such errors, drawn apart, differ by ``sqrt(2)`` of one; and one draw may be three times
the other (the spread of repeated draws, as measured on a trained model): four times its own error is the bound.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paritykit.errors import UnknownNameError, UsageError
from paritykit.testing import TRANSPLANTS, tiny_config, tiny_model
from paritykit.testing.transplants import EXPERTS, WEIGHTS, transplant

SPREAD = 4.0
SIZES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "num_attention_heads": st.sampled_from([3, 4]),
        "head_dim": st.sampled_from([16, 32]),
        "tie_word_embeddings": st.booleans(),
    }
)


def small_llama(**fields: Any) -> Path:
    heads = fields.get("num_attention_heads", 4)
    size = {"num_hidden_layers": 2, "num_key_value_heads": heads if heads == 3 else 2}
    return tiny_model("llama", **{**size, **fields, "hidden_size": heads * fields.get("head_dim", 32)})


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """On seeded tokens, ``[tokens, vocabulary]`` in float64; every tensor of the folder must be one of the model's."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, 499, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens).logits[0].double()
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@cache
def original(folder: Path) -> tuple[torch.Tensor, float]:
    """Its logits in float32, and their own error."""
    found = logits(folder)
    return found, distance(found, logits(folder, torch.float64))


@settings(deadline=None, max_examples=28)
@given(sizes=SIZES, family=st.sampled_from(TRANSPLANTS))
def test_a_transplant_computes_the_same(
    sizes: dict[str, Any], family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, target = small_llama(**sizes), tmp_path_factory.mktemp("same")
    transplant(source, family, target)
    before, error = original(source)
    assert error > 0
    assert distance(logits(target), before) <= SPREAD * error
    assert json.loads((target / "config.json").read_text())["model_type"] == family


@pytest.mark.parametrize("family", TRANSPLANTS)
def test_what_a_family_changes_matters(family: str, tmp_path: Path) -> None:
    """A transplant into the family with one thing left as it was is no longer the same, by far more than rounding."""
    source = small_llama()
    transplant(source, family, tmp_path)
    _spoil(tmp_path, family)
    before, error = original(source)
    assert distance(logits(tmp_path), before) > 1000 * SPREAD * error


def _spoil(folder: Path, family: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    first = "model.layers.0.self_attn"
    if family == "qwen2":
        tensors[f"{first}.v_proj.bias"] += 0.3
    elif family == "phi3":
        tensors[f"{first}.qkv_proj.weight"] = tensors[f"{first}.qkv_proj.weight"].flip(0)
    elif family == "granite":
        config["residual_multiplier"] = 1.0
    elif family == "mixtral":
        tensors["model.layers.0.block_sparse_moe.experts.0.w2.weight"] *= 1.5
    elif family == "ernie4_5":
        tensors[f"{first}.q_proj.weight"] = load_file(small_llama() / WEIGHTS)[f"{first}.q_proj.weight"]
    elif family == "smollm3":
        config["no_rope_layers"] = [0, 1]
    else:
        config["sliding_window"] = 4
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_every_expert_is_asked(tmp_path: Path) -> None:
    transplant(small_llama(), "mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(200)[None]
    with torch.no_grad():
        routed = model(tokens, output_router_logits=True).router_logits
    assert all(len(layer.topk(2).indices.unique()) == EXPERTS for layer in routed)


def test_only_the_first_layers(tmp_path: Path) -> None:
    source = small_llama(num_hidden_layers=3)
    transplant(source, "llama", tmp_path / "whole")
    transplant(source, "llama", tmp_path / "cut", num_hidden_layers=2)
    assert torch.equal(logits(tmp_path / "whole"), logits(source))
    whole = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    whole.model.layers = whole.model.layers[:2]
    tokens = torch.randint(0, 499, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits[0].double()
    assert torch.equal(logits(tmp_path / "cut"), expected)


def test_the_config_is_kept_as_it_comes(tmp_path: Path) -> None:
    source = small_llama()
    transplant(source, "llama", tmp_path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path))
    assert before == after


@pytest.mark.parametrize(("family", "source", "changes", "said"), [
    ("mistrul", {}, {}, "unknown family for the weights of a Llama 'mistrul'; did you mean 'mistral'"),
    ("qwen3", {}, {}, "unknown family for the weights of a Llama 'qwen3'"),
    ("mistral", {}, {"num_hidden_layers": 3}, "has 2 layers, not 3"),
    ("mistral", {"attention_bias": True}, {}, "has biases, which not every family can take"),
    ("phi3", {"hidden_size": 96}, {}, "phi3 has no head_dim of its own, and 32 needs one"),
])  # fmt: skip
def test_what_cannot_be_is_told(
    family: str, source: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    llama = tiny_model("llama", **{"num_hidden_layers": 2, "hidden_size": 128, **source})
    with pytest.raises((UnknownNameError, UsageError), match=said):
        transplant(llama, family, tmp_path, **changes)


def test_only_a_llama_is_a_source(tmp_path: Path) -> None:
    assert tiny_config("qwen2")["model_type"] != "llama"
    with pytest.raises(UsageError, match=r"is not a Llama checkpoint with its weights in model\.safetensors"):
        transplant(tiny_model("qwen2"), "mistral", tmp_path)
