"""Stages: which layers each has, what is built and loaded there, and that together they are the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.config import NanoConfig
from paritykit.engines.nano.facts import module_facts
from paritykit.engines.nano.group import Alone
from paritykit.engines.nano.model import CausalLM
from paritykit.engines.nano.parameter import Build
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.stage import Stage, share_layers
from paritykit.engines.nano.weights import checkpoint_files, checkpoint_targets, load_checkpoint, read_tensors
from paritykit.engines.stages import merge_facts
from paritykit.errors import EngineError, UsageError
from paritykit.testing import tiny_model

CPU = torch.device("cpu")


def built(folder: Path, stage: Stage) -> CausalLM:
    return CausalLM(NanoConfig.of(Checkpoint(folder)), Build(Alone(), torch.float32, CPU, stage))


@given(st.integers(1, 200), st.integers(1, 32))
def test_layers_are_shared_out_evenly_and_in_order(total: int, stages: int) -> None:
    shares = share_layers(total, stages)
    assert [n for share in shares for n in share] == list(range(total))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == total // stages
    longer = [n for n, size in enumerate(sizes) if size > total // stages]
    assert longer == list(range(stages - 1 - len(longer), stages - 1))


@pytest.mark.parametrize(("total", "stages", "sizes"), [
    (4, 2, [2, 2]), (5, 2, [3, 2]), (4, 3, [1, 2, 1]), (5, 3, [2, 2, 1]), (3, 3, [1, 1, 1]),
    (61, 8, [7, 7, 8, 8, 8, 8, 8, 7]),
])  # fmt: skip
def test_the_split_is_that_of_vllm(total: int, stages: int, sizes: list[int]) -> None:
    """As ``vllm.distributed.utils.get_pp_indices`` of vLLM 0.32 gave."""
    assert [len(share) for share in share_layers(total, stages)] == sizes


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gemma3", "mixtral"])
@pytest.mark.parametrize("count", [2, 3])
def test_stages_together_are_the_model(family: str, count: int) -> None:
    folder = tiny_model(family, num_hidden_layers=5)
    whole, tensors = built(folder, Stage()), dict(read_tensors(folder, checkpoint_files(folder)))
    load_checkpoint(whole, folder)
    expected, held = dict(whole.named_parameters(remove_duplicate=False)), set[str]()
    names: list[str] = []
    for number in range(count):
        model = built(folder, Stage(number, count))
        targets = checkpoint_targets(model)
        assert {n for n in tensors if not model.elsewhere(n)} == set(targets)
        load_checkpoint(model, folder)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert torch.equal(parameter, expected[name]), name
            held.add(name)
        names += [n for n, _ in model.named_modules(remove_duplicate=False)]
    assert held == set(expected)
    assert set(names) == {n for n, _ in whole.named_modules(remove_duplicate=False)}


def test_a_stage_has_its_modules_under_their_own_names_and_no_others() -> None:
    folder = tiny_model("qwen2", num_hidden_layers=3)
    first, last = (built(folder, Stage(n, 2)) for n in range(2))
    have = [{n for n, _ in m.named_modules()} for m in (first, last)]
    assert {"model.embed_tokens", "model.layers.0", "model.layers.1"} <= have[0]
    assert {"model.layers.2.self_attn.qkv_proj", "model.norm", "lm_head"} <= have[1]
    assert have[0] & have[1] == {"", "model", "model.layers"}
    assert last.model.layers[2] is last.model.layers[-1] is last.get_submodule("model.layers.2")
    assert [len(m.model.layers) for m in (first, last)] == [2, 1]
    with pytest.raises(IndexError, match=r"layer 1 is on another stage; here are 2"):
        last.model.layers[1]
    with pytest.raises(IndexError):
        last.model.layers[3]


def test_a_tied_head_brings_the_embedding_to_the_last_stage() -> None:
    folder = tiny_model("llama_tied", num_hidden_layers=3)
    models = [built(folder, Stage(n, 3)) for n in range(3)]
    assert [m.model.embed_tokens is not None for m in models] == [True, False, True]
    assert [m.lm_head is not None for m in models] == [False, False, True]
    last = models[2]
    assert last.lm_head is not None
    assert last.model.embed_tokens is not None
    assert last.lm_head.weight is last.model.embed_tokens.weight


def test_a_stage_takes_or_refuses_what_is_its_own_and_leaves_the_rest() -> None:
    folder = tiny_model("qwen2", num_hidden_layers=4)
    first, last = (built(folder, Stage(n, 2)) for n in range(2))
    one = torch.zeros(128)
    assert first.load_weights([("model.norm.weight", one), ("lm_head.weight", one)]) == set()
    assert last.load_weights([("model.norm.weight", one)]) == {"model.norm.weight"}
    for model, name in ((first, "model.layers.1.odd"), (last, "lm_head.odd"), (last, "model.layers.3.odd.weight")):
        with pytest.raises(EngineError, match=f"has a tensor '{name}'"):
            model.load_weights([(name, one)])
    assert first.load_weights([("model.layers.3.odd.weight", one)]) == set()
    for model in (first, last):
        for name in ("model.layers.4.input_layernorm.weight", "odd", "model.odd"):
            with pytest.raises(EngineError, match=f"has a tensor '{name}'"):
                model.load_weights([(name, one)])


def test_what_stages_say_of_their_modules_is_put_together() -> None:
    folder = tiny_model("gemma3", num_hidden_layers=4)
    whole = module_facts(built(folder, Stage()))
    parts = [module_facts(built(folder, Stage(n, 3))) for n in range(3)]
    merged = merge_facts(parts)
    assert set(merged["modules"]) == set(whole["modules"])
    assert {k: v for k, v in merged.items() if k != "modules"} == {k: v for k, v in whole.items() if k != "modules"}


def test_facts_that_differ_keep_what_was_said_first() -> None:
    ranks: list[dict[str, Any]] = [
        {"a": {"x": 1}, "b": ["p", "q"], "c": "one"},
        {"a": {"x": 2, "y": 3}, "b": ["q", "r"], "c": "two", "d": 1},
    ]
    assert merge_facts(ranks) == {"a": {"x": 1, "y": 3}, "b": ["p", "q", "r"], "c": "one", "d": 1}
    assert ranks[0]["a"] == {"x": 1}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"pipeline_parallel_size": 0}, "pipeline_parallel_size must be an integer of at least 1"),
    ({"pipeline_parallel_size": 3}, "pipeline_parallel_size 3 is more than the model's 2 layers"),
    ({"distributed_backend": "mpi"}, "unknown distributed_backend 'mpi'"),
])  # fmt: skip
def test_settings_it_refuses(arguments: dict[str, Any], message: str) -> None:
    folder = tiny_model("qwen2", num_hidden_layers=2)
    with pytest.raises(UsageError, match=message):
        Settings(model=str(folder), **arguments).resolve(NanoConfig.of(Checkpoint(folder)))
