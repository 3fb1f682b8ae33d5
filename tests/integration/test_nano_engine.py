"""nano as an engine: its cache as points, replay, other weights, errors, a clean end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import paritykit as pk
from paritykit.captures.recorder import Selection
from paritykit.engines.nano.core import NanoLLM
from paritykit.engines.nano.engine import NanoEngine
from paritykit.errors import EngineError, UnknownNameError, UsageError
from paritykit.runner import weight_results
from paritykit.testing import tiny_model
from tests.nano import one_thread

LAYERS = 2
CASES = [
    pk.Case(id="a", tokens=tuple(range(3, 20)), new_tokens=5),
    pk.Case(id="b", tokens=(498, 7), new_tokens=2),
    pk.Case(id="c", tokens=(1, 2, 3), batch=1),
]
CACHES = ["*#key_cache", "*#value_cache"]
ATTENTION = "model.layers.1.self_attn"


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("qwen3", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def opened(request: pytest.FixtureRequest, model: Path) -> Iterator[NanoEngine]:
    engine = NanoEngine(str(model), tensor_parallel_size=request.param, block_size=3, max_num_batched_tokens=8)
    engine.open()
    yield engine
    engine.close()


def joined(capture: pk.Capture, key: str, case: str) -> torch.Tensor:
    return torch.cat([capture.rows(key, case, rank=r) for r in range(capture.ranks)], dim=1)


def test_the_cache_is_recorded_as_requests_end(opened: NanoEngine, model: Path, tmp_path: Path) -> None:
    capture = opened.run(CASES, points=Selection(CACHES), out=tmp_path / "capture")
    assert list(capture.points) == [
        f"model.layers.{n}.self_attn#{p}_cache" for n in range(LAYERS) for p in ("key", "value")
    ]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    for case in CASES:
        tokens = [*case.tokens, *capture.generated(case.id)][: case.positions]
        with torch.no_grad():
            cache = reference(torch.tensor([tokens]), use_cache=True).past_key_values
        for n in range(LAYERS):
            for port, tensor in (("key", cache.layers[n].keys), ("value", cache.layers[n].values)):
                found = joined(capture, f"model.layers.{n}.self_attn#{port}_cache", case.id)
                assert found.shape == (case.positions, 2, 32)
                torch.testing.assert_close(found, tensor[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_nothing_is_left_of_a_run(opened: NanoEngine, tmp_path: Path) -> None:
    opened.run(CASES, points=Selection(), out=tmp_path / "one")
    assert not any(opened.llm.blocks.references)
    modules = opened.llm.team.worker.model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_case_that_cannot_be_leaves_the_engine_usable(opened: NanoEngine, tmp_path: Path) -> None:
    long = pk.Case(id="long", tokens=tuple(range(400)), new_tokens=200)
    with pytest.raises(UsageError, match="400 prompt tokens and 200 new ones are more than max_model_len 512"):
        opened.run([CASES[0], long], points=Selection(), out=tmp_path / "one")
    assert not list(tmp_path.iterdir())
    again = opened.run(CASES, points=Selection(["#logits"]), out=tmp_path / "two")
    assert again.rows("#logits", "a").shape == (21, 499)


def test_parameters_and_other_weights(opened: NanoEngine, model: Path, tmp_path: Path) -> None:
    name = f"{ATTENTION}.qkv_proj.weight"
    ranks = opened.parameters()
    assert len(ranks) == opened.llm.settings.tensor_parallel_size
    tensors = load_file(model / "model.safetensors")
    queries = torch.cat([r[name][: 128 // len(ranks)] for r in ranks])
    assert torch.equal(queries, tensors[f"{ATTENTION}.q_proj.weight"])
    opened.load_weights(str(tiny_model("qwen3", num_hidden_layers=LAYERS, seed=1)))
    assert not torch.equal(opened.parameters()[0][name], ranks[0][name])
    opened.load_weights(str(model))
    assert torch.equal(opened.parameters()[-1][name], ranks[-1][name])


def test_its_loader_is_traced(opened: NanoEngine, model: Path) -> None:
    results = weight_results(opened.ledger(), opened.describe(), opened.checkpoint)
    assert results.summary.verdict == "pass", results.findings
    assert {f.point for f in results.findings} == set(load_file(model / "model.safetensors"))


def test_a_fault_in_its_loader_is_found(model: Path) -> None:
    engine = NanoEngine(str(model), before_load="tests.integration.test_nano_engine:swap_gate_and_up")
    engine.open()
    results = weight_results(engine.ledger(), engine.describe(), engine.checkpoint)
    engine.close()
    assert {f.point for f in results.findings if f.verdict == "fail"} == {
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")
    }


def swap_gate_and_up(model: Any, *, rank: int) -> None:
    parameter = model.model.layers[1].mlp.gate_up_proj.weight
    load = parameter.weight_loader
    parameter.weight_loader = lambda p, tensor, shard: load(p, tensor, 1 - shard)


def test_untraced(model: Path) -> None:
    engine = NanoEngine(str(model), provenance=False)
    engine.open()
    with pytest.raises(EngineError, match="nano's loader was not traced"):
        engine.ledger()
    engine.close()


def test_it_says_how_it_runs(opened: NanoEngine) -> None:
    side = opened.describe()
    assert (side.engine, side.dtype, side.attention_backend) == ("nano", "float32", "torch")
    assert side.args["block_size"] == "3"
    assert side.args["max_model_len"] == "512"


def test_in_a_process_of_its_own(model: Path) -> None:
    engine = pk.engine("nano", model, tensor_parallel_size=2)
    capture = pk.capture(engine, cases=CASES)
    assert capture.rows("#logits", "b").shape == (3, 499)
    assert capture.ranks == 2


def test_not_open(model: Path) -> None:
    engine = NanoEngine(str(model))
    engine.close()
    with pytest.raises(EngineError, match="engine 'nano' is not open"):
        engine.describe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocksize": 3}, "unknown nano argument 'blocksize'; did you mean 'block_size'"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, not 0"),
        ({"max_num_batched_tokens": "many"}, "max_num_batched_tokens must be an integer of at least 1"),
        ({"num_blocks": -1}, "num_blocks must be an integer of at least 0"),
        ({"kv": "pagd"}, "unknown KV cache layout 'pagd'; did you mean 'paged'"),
        ({"kv_dtype": "int4"}, "unknown kv_dtype 'int4'"),
        ({"dtype": "float23"}, "unknown dtype 'float23'"),
        ({"attention_backend": "triton2"}, "unknown attention backend of nano 'triton2'"),
        ({"kv": "contiguous", "enable_prefix_caching": True}, "enable_prefix_caching needs kv='paged'"),
        ({"max_model_len": 4096}, "max_model_len 4096 is more than the model's 512 positions"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size 3 does not divide the model's 4 attention heads"),
        ({"timeout": 0.0}, "timeout must be positive"),
    ],
)
def test_arguments_it_refuses(model: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NanoLLM(model, **arguments)


def test_a_model_it_does_not_know() -> None:
    with pytest.raises(UsageError, match=r"unknown architecture .*: 'GPT2LMHeadModel'.*LlamaForCausalLM"):
        NanoLLM(tiny_model("gpt2"))


def test_a_device_that_is_not_there(model: Path) -> None:
    with pytest.raises(EngineError, match=r"nano cannot start .*qwen3"):
        NanoLLM(model, device="cuda:99")


def test_requests_it_refuses(model: Path) -> None:
    with NanoLLM(model, block_size=4, num_blocks=3, max_model_len=32) as llm:
        llm.add_request([1, 2], id="taken", max_tokens=1)
        for tokens, options, message in (
            ([], {}, "needs a prompt"),
            ([1], {"max_tokens": 1, "forced": [1, 2]}, "at least as many max_tokens as forced ids"),
            ([499], {}, "token id 499 is outside the vocabulary \\(0 to 498\\)"),
            ([1] * 20, {"max_tokens": 13}, "20 prompt tokens and 13 new ones are more than max_model_len 32"),
            ([1] * 10, {"max_tokens": 4}, "needs 4 blocks of 4 positions, and the pool has 3: raise num_blocks"),
            ([1], {"id": "taken"}, "request id 'taken' is in use"),
        ):
            with pytest.raises(UsageError, match=message):
                llm.add_request(tokens, **options)
        assert len(llm.generate([[1] * 10], max_tokens=3)[0]) == 3
        with pytest.raises(UnknownNameError, match="unknown unfinished request 'taken'"):
            llm.abort("taken")


def test_a_stop_token_ends_a_request(model: Path) -> None:
    with NanoLLM(model) as llm:
        (text,) = llm.generate([[1, 2, 3]], max_tokens=9)
        assert llm.generate([[1, 2, 3]], max_tokens=9, stop=[text[3]]) == [text[: text.index(text[3]) + 1]]
