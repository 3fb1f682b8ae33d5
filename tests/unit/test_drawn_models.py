"""Models drawn from a config class alone: small, causal, every kind of layer in them, no table of families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.errors import ParityError, UnknownNameError, UsageError
from paritykit.testing import DrawnModel, drawn_model
from paritykit.testing.drawn.catalogue import causal_classes, config_class, find_class
from paritykit.testing.drawn.fields import chosen_layers, small_fields
from paritykit.testing.drawn.model import draw_fields
from paritykit.testing.drawn.roles import ROLES, Sizes, limit_of, role_of, small
from paritykit.testing.drawn.search import find_working
from paritykit.testing.drawn.trying import NOT_CAUSAL, STAGES, probe_tokens, try_fields

FIXED = ("cohere", "jamba", "exaone_moe")
"""One with a layer norm and parallel blocks, a hybrid whose layers its class counts out, one with lists of layers."""


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("role", sorted({role for role, _ in ROLES} - {"kept", "latent"}))
def test_every_role_has_a_size(role: str) -> None:
    assert limit_of(role, Sizes()) >= 1


def test_no_integer_grows() -> None:
    for name in ("hidden_size", "num_key_value_heads", "moe_intermediate_size", "sliding_window", "n_positions", "foo"):
        assert small(name, 10**6, Sizes()) < 1000, name
    assert role_of("num_experts_per_tok") == "chosen"


def test_layers_of_every_kind_are_kept_in_their_order() -> None:
    kinds = [("s",)] * 5 + [("f",)] + [("s",)] * 5 + [("x",)]
    assert chosen_layers(kinds, 4) == [0, 1, 5, 11]
    assert [kinds[n] for n in chosen_layers(kinds, 2)] == [("s",), ("f",), ("x",)]


@pytest.mark.parametrize("model_type", FIXED)
def test_a_drawn_model_works_and_is_the_same_each_time(model_type: str, tmp_path: Path) -> None:
    first, second = (drawn_model(model_type, tmp_path / name, seed=3) for name in ("a", "b"))
    assert config(first)["architectures"] == [causal_classes()[model_type]]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


@pytest.mark.parametrize("model_type", [*FIXED, "deepseek_v3"])
def test_a_drawn_model_is_read_back_as_the_one_that_was_tried(model_type: str, tmp_path: Path) -> None:
    folder, (_, tried) = drawn_model(model_type, tmp_path / "drawn"), draw_fields(model_type)
    model = find_class(model_type).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found = model(probe_tokens(len(tried.logits[0])), use_cache=False).logits[0]
    assert (found - tried.logits).abs().max() < 1e-5 * tried.logits.abs().max()


def test_every_kind_of_layer_of_a_hybrid_is_there() -> None:
    _, tried = draw_fields("jamba")
    kinds = {type(layer).__name__ for layer in tried.model.model.layers}
    assert len(kinds) > 1, kinds


def test_a_class_that_is_not_causal_by_default_is_made_so() -> None:
    fields = small_fields(config_class("bert"), Sizes())
    before = try_fields("bert", fields, seed=0)
    assert STAGES[before.stage] == "causal"
    assert NOT_CAUSAL in before.error
    mended, after = find_working("bert", fields, Sizes(), seed=0)
    assert after.works, after.error
    assert mended["is_decoder"] is True


def test_another_seed_turns_switches_that_change_what_is_computed() -> None:
    plain, _ = draw_fields("cohere")
    drawn = [draw_fields("cohere", seed=seed)[0] for seed in (1, 2, 3)]
    turned = {name for fields in drawn for name in fields if plain.get(name) != fields[name]}
    assert turned & {"attention_bias", "use_qk_norm", "tie_word_embeddings", "rope_parameters", "num_key_value_heads"}
    assert not turned & {"use_cache", "output_router_logits"}, "these change nothing that is computed"


def test_what_cannot_be_drawn_says_so() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cohere'"):
        drawn_model("coherre")
    with pytest.raises(UsageError, match="more than text goes into it"):
        drawn_model("whisper")
    with pytest.raises(UnknownNameError, match="dtype"):
        drawn_model("cohere", dtype="float8")


@pytest.mark.parametrize("name", ["drawn:cohere,seed=x", "drawn:cohere,seed=1,seed=2", "drawn:cohere,hidden_size=64"])
def test_a_name_that_cannot_be_read(name: str) -> None:
    with pytest.raises(ParityError, match="drawn:cohere"):
        DrawnModel(name)


def test_a_name_is_read_and_shown() -> None:
    named = DrawnModel("drawn:gpt-sw3,seed=7,dtype=bfloat16")
    assert (named.model_type, named.options, str(named)) == ("gpt-sw3", {"seed": 7, "dtype": "bfloat16"}, named.name)
