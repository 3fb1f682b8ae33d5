"""Pipeline parallelism of nano: parity, the same bits as one stage, the ledger, replay, and faults at the border."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import paritykit as pk
from paritykit.captures.recorder import Selection
from paritykit.config import load_config
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.core import NanoLLM
from paritykit.engines.nano.engine import NanoEngine
from paritykit.engines.nano.group import Alone
from paritykit.engines.nano.place import Place
from paritykit.engines.nano.stage import Stage
from paritykit.engines.nano.worker import Worker
from paritykit.results import Results
from paritykit.runner import compare_captures, weight_results
from paritykit.testing import tiny_model
from tests.nano import ThreadTeam, Told, drive, one_thread, poison_free_blocks

WORST = 1e-5
BORDER = 2
"""First layer of the second stage, where four layers are on two."""
CASES = [
    pk.Case(id="long", tokens=tuple((11 * k + 5) % 499 for k in range(45)), new_tokens=8),
    pk.Case(id="one", tokens=(498,), new_tokens=3),
]
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "two stages": ("qwen2", {"num_hidden_layers": 4}, {"pipeline_parallel_size": 2, "block_size": 3}),
    "a tied head after uneven stages": ("llama_tied", {"num_hidden_layers": 4}, {"pipeline_parallel_size": 3}),
    "windows and two ropes": ("gemma3", {"num_hidden_layers": 3}, {"pipeline_parallel_size": 2}),
    "experts": ("mixtral", {"num_hidden_layers": 2}, {"pipeline_parallel_size": 2, "kv": "contiguous"}),
    "two stages of two ranks": (
        "gemma2",
        {"num_hidden_layers": 4},
        {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
    ),
    "three uneven stages of two ranks": (
        "qwen3_moe",
        {"num_hidden_layers": 5},
        {"pipeline_parallel_size": 3, "tensor_parallel_size": 2},
    ),
}
DEEP = {"two stages of two ranks", "three uneven stages of two ranks"}
PROMPTS = [tuple((7 * n + 3 * k + n * k) % 499 for k in range(length)) for n, length in enumerate((40, 1, 13))]
NEW = 10
CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "contiguous": {"kv": "contiguous"},
    "chunks of 5": {"max_num_batched_tokens": 5},
    "token by token": {"max_num_batched_tokens": 1},
    "prefix caching": {"enable_prefix_caching": True, "block_size": 4, "max_num_batched_tokens": 16},
    "preemption": {"block_size": 4, "num_blocks": 16},
    "all at once": {"block_size": 3, "num_blocks": 20, "max_num_batched_tokens": 7, "enable_prefix_caching": True},
}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def make(name: str) -> tuple[Path, dict[str, Any]]:
    family, sizes, arguments = MODELS[name]
    return tiny_model(family, **sizes), {"max_num_batched_tokens": 37, **arguments}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], pk.Capture]:
    """Hugging Face's capture of a model, made once."""
    folder, known = tmp_path_factory.mktemp("references"), dict[Path, pk.Capture]()

    def capture(model: Path) -> pk.Capture:
        if model not in known:
            engine = HFEngine(str(model))
            engine.open()
            known[model] = engine.run(CASES, points=Selection(), out=folder / model.name)
            engine.close()
        return known[model]

    return capture


@pytest.fixture(scope="module")
def engines() -> Iterator[Callable[[str], NanoEngine]]:
    """An engine of ``MODELS``, opened once: its ranks take seconds to start."""
    known: dict[str, NanoEngine] = {}

    def engine(name: str) -> NanoEngine:
        if name not in known:
            model, arguments = make(name)
            known[name] = NanoEngine(str(model), **arguments)
            known[name].open()
        return known[name]

    yield engine
    for one in known.values():
        one.close()


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.deep if n in DEEP else ()) for n in MODELS])
def opened(request: pytest.FixtureRequest, engines: Callable[[str], NanoEngine]) -> NanoEngine:
    return engines(request.param)


def compared(engine: NanoEngine, reference: pk.Capture, out: Path) -> Results:
    fed = [c.force(reference.generated(c.id)) for c in CASES]
    capture = engine.run(fed, points=Selection(), out=out)
    return compare_captures(reference, capture, config=load_config({}, environ={}))


def test_parity_at_every_point(opened: NanoEngine, references: Callable[[Path], pk.Capture], tmp_path: Path) -> None:
    results = compared(opened, references(opened.checkpoint.path), tmp_path / "capture")
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.unmatched == 0, [c.unmatched for c in results.coverage]
    skipped = {u.point.rpartition(".")[2].partition("@")[0] for c in results.coverage for u in c.skipped}
    assert skipped <= {"rotary_emb", "embed_tokens", "act_fn", "attn"}
    measured = [f for f in results.findings if f.check != "tokens"]
    assert max(f.metrics["rel_max"] or 0.0 for f in measured) < WORST
    assert {f.positions for f in measured if f.case == "long"} == {(0, 51)}


def test_every_stage_loads_its_share_and_together_all(opened: NanoEngine) -> None:
    tensors = load_file(opened.checkpoint.path / "model.safetensors")
    results = weight_results(opened.ledger(), opened.describe(), opened.checkpoint)
    assert results.summary.verdict == "pass", results.summary
    assert {f.point for f in results.findings} == set(tensors)
    assert results.summary.compared == len(tensors)


def test_each_rank_has_the_parameters_of_its_stage(opened: NanoEngine) -> None:
    settings, ranks = opened.llm.settings, opened.parameters()
    assert len(ranks) == settings.pipeline_parallel_size * settings.tensor_parallel_size
    layers = [{int(n.split(".")[2]) for n in held if n.startswith("model.layers.")} for held in ranks]
    stages = layers[:: settings.tensor_parallel_size]
    assert [n for stage in stages for n in sorted(stage)] == list(range(len(opened.llm.config.layers)))
    assert all(layers[rank] == stages[rank // settings.tensor_parallel_size] for rank in range(len(ranks)))
    assert ["model.norm.weight" in held for held in ranks] == [layer == stages[-1] for layer in layers]


def test_it_says_how_many_stages(opened: NanoEngine) -> None:
    assert "pipeline_parallel" in opened.capabilities
    settings = opened.llm.settings
    assert opened.describe().parallel == {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
    }


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("family", "layers", "stages"), [("llama_tied", 4, 3), ("gemma3", 3, 2), ("mixtral", 2, 2)])
def test_stages_give_the_bits_of_one(family: str, layers: int, stages: int, condition: str) -> None:
    model, arguments = tiny_model(family, num_hidden_layers=layers), CONDITIONS[condition]
    with NanoLLM(model, **arguments) as whole:
        expected = drive(whole, PROMPTS, max_tokens=NEW)
    with NanoLLM(model, **arguments) as llm:
        team = ThreadTeam(llm.settings, 1, stages=stages)
        llm.team = team  # type: ignore[assignment]
        requests = [llm.add_request(p, max_tokens=NEW) for p in PROMPTS]
        watched, told = [llm.scheduler.find(r) for r in requests], {r: Told() for r in requests}
        while llm.unfinished:
            for output in llm.step():
                told[output.id].take(output)
            poison_free_blocks(llm)
        assert all(a.same_bits(b) for a, b in zip(expected, told.values(), strict=True))
        if condition == "preemption":
            assert sum(r.preemptions for r in watched if r) > 0
    assert [len(w.caches) for w in team.workers] == [len(w.model.model.layers) for w in team.workers]


def test_stages_that_are_processes_give_the_bits_of_one(engines: Callable[[str], NanoEngine]) -> None:
    model, arguments = make("two stages")
    with NanoLLM(model, **arguments | {"pipeline_parallel_size": 1}) as one:
        expected = drive(one, PROMPTS, max_tokens=NEW)
    told = drive(engines("two stages").llm, PROMPTS, max_tokens=NEW)
    assert all(a.same_bits(b) for a, b in zip(expected, told, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_stages_pass_on_other_dtypes(dtype: str) -> None:
    model = tiny_model("gemma3", num_hidden_layers=3)
    with NanoLLM(model, dtype=dtype) as one, NanoLLM(model, dtype=dtype) as llm:
        llm.team = ThreadTeam(llm.settings, 2, stages=2)  # type: ignore[assignment]
        (told,) = drive(llm, PROMPTS[:1], max_tokens=1)
        assert drive(one, PROMPTS[:1], max_tokens=1)[0].error(told) < (1e-9 if dtype == "float64" else 5e-2)


def test_residual_dropped_at_the_border(
    engines: Callable[[str], NanoEngine], references: Callable[[Path], pk.Capture], tmp_path: Path
) -> None:
    """Layer 1 is right on its stage, and what layer 2 is given is not what layer 1 gave (vLLM #37622)."""
    engine = engines("two stages")
    engine.llm.team.call("call", "tests.integration.test_nano_stages:hand_on_without_residual", {})
    results = compared(engine, references(engine.checkpoint.path), tmp_path / "capture")
    engine.llm.team.call("call", "tests.integration.test_nano_stages:hand_on_all", {})
    first = results.summary.first_divergence
    assert first is not None
    assert (first.point, first.seen_at) == (f"model.layers.{BORDER}", f"model.layers.{BORDER}.input_layernorm#input")
    assert first.origin == "introduced"
    failing = {f.point for f in results.findings if f.verdict == "fail"}
    assert not any(re.match(r"model\.(embed|layers\.[01]\.)", point) for point in failing)


def test_a_stage_with_the_weights_of_the_layer_before(references: Callable[[Path], pk.Capture], tmp_path: Path) -> None:
    model, arguments = make("two stages")
    engine = NanoEngine(str(model), before_load="tests.integration.test_nano_stages:load_off_by_one", **arguments)
    engine.open()
    weights = weight_results(engine.ledger(), engine.describe(), engine.checkpoint)
    results = compared(engine, references(model), tmp_path / "capture")
    engine.close()
    wrong = {f.point: f.message for f in weights.findings if f.verdict == "fail"}
    assert {int(p.split(".")[2]) for p in wrong} == {1, 2, 3}
    name = "model.layers.{}.input_layernorm.weight".format
    assert wrong[name(1)].startswith(f"{name(1)} fills {name(1)} on rank 0 and {name(2)} on rank 1")
    assert wrong[name(3)].startswith(f"{name(3)} was not even read by the loader")
    assert weights.summary.first_divergence is not None
    assert weights.summary.first_divergence.point.startswith("model.layers.1.")
    first = results.summary.first_divergence
    assert first is not None
    assert first.origin == "introduced"
    assert re.match(rf"model\.layers\.{BORDER}\b", first.point)
    failing = {f.point for f in results.findings if f.verdict == "fail"}
    assert not any(re.match(r"model\.(embed|layers\.[01]\.)", point) for point in failing)


def test_a_tensor_that_no_stage_loads_is_an_error(engines: Callable[[str], NanoEngine]) -> None:
    engine, planted = engines("two stages"), "tests.integration.test_nano_stages:load_no_norm"
    settings = msgspec.structs.replace(engine.llm.settings, before_load=planted)
    places = [Place(Stage(n, 2), world=Alone(n, 2)) for n in range(2)]
    ledgers = [Worker(settings, place).ledger() for place in places]
    weights = weight_results(ledgers, engine.describe(), engine.checkpoint)
    wrong = {f.point: f.message for f in weights.findings if f.verdict == "fail"}
    assert set(wrong) == {"model.norm.weight"}
    assert wrong["model.norm.weight"].startswith("model.norm.weight was not even read by the loader")


def hand_on_without_residual(worker: Any) -> None:
    """Only what the last MLP of the first stage adds goes to the next stage."""
    if not worker.place.stage.last:
        added: list[torch.Tensor] = []
        worker.model.model.layers[BORDER - 1].mlp.register_forward_hook(lambda m, args, output: added.append(output))
        forward = worker.model.forward

        def wrong(*args: Any) -> torch.Tensor:
            forward(*args)
            return added.pop()

        worker.model.forward = wrong


def hand_on_all(worker: Any) -> None:
    """As it was before."""
    if not worker.place.stage.last:
        del worker.model.forward
        worker.model.model.layers[BORDER - 1].mlp._forward_hooks.clear()


def load_off_by_one(model: Any, *, rank: int) -> None:
    """The second stage fills each layer from the layer before it."""
    if rank == 1:
        load, elsewhere = model.load_weights, model.elsewhere
        model.load_weights = lambda weights: load((later(n), t) for n, t in weights)
        model.elsewhere = lambda name: elsewhere(later(name)) or later(name).startswith("model.layers.4.")


def later(name: str) -> str:
    return re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + 1}", name)


def load_no_norm(model: Any, *, rank: int) -> None:
    """Every stage leaves the final norm to another."""
    elsewhere = model.elsewhere
    model.elsewhere = lambda name: elsewhere(name) or name == "model.norm.weight"
