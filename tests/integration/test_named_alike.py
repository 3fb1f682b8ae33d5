"""One name, two meanings, on real engines: a clean pair passes, and a fault in the same module is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import paritykit as pk
from paritykit.plan import make_plan
from paritykit.results import Results
from paritykit.testing import tiny_model
from tests.integration.conftest import Bench
from tests.integration.flat import engine
from tests.integration.strangers import make
from tests.integration.test_strangers import compared

HERE = f"{__name__}:"
CASES = [pk.Case(id="a", tokens=tuple(range(5, 45)), new_tokens=4), pk.Case(id="b", tokens=(7, 9, 400), new_tokens=3)]


def spoil(worker: Any, *, module: str) -> None:
    """What the module gives is five per cent too large."""

    def larger(_: Any, args: Any, output: Any) -> Any:
        return (output[0] * 1.05, *output[1:]) if isinstance(output, tuple) else output * 1.05

    worker.model_runner.model.get_submodule(module).register_forward_hook(larger)


def spoil_each(worker: Any, *, ending: str) -> None:
    """The same in every layer."""
    for name, _ in worker.model_runner.model.named_modules():
        if name.endswith(ending):
            spoil(worker, module=name)


def declare_nothing(worker: Any) -> None:
    """As a model of somebody's own, which loads its fused weights without saying how."""
    model = worker.model_runner.model
    model.packed_modules_mapping, model.hf_to_vllm_mapper = {}, None


def tanh(worker: Any) -> None:
    """vLLM's Bloom has the exact gelu where transformers has the tanh form."""
    for name, module in worker.model_runner.model.named_modules():
        if name.endswith("gelu_impl"):
            module.forward = lambda x: torch.nn.functional.gelu(x, approximate="tanh")


PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("model.layers.1.self_attn.o_proj", {}),
    "qwen2_moe": ("model.layers.1.mlp.shared_expert.down_proj", {}),
    "granitemoe": ("model.layers.1.block_sparse_moe.experts", {}),
    "ernie4_5": ("model.layers.1.mlp.down_proj", {}),
    "cohere2": ("model.layers.1.mlp.down_proj", {}),
}
"""Architectures, and a module to plant a fault in: in or beside what is named alike."""
IN_CI = ("cohere", "qwen2_moe")
KINDS = [k if k in IN_CI else pytest.param(k, marks=pytest.mark.deep) for k in PAIRS]


def first(results: Results) -> str:
    found = results.summary.first_divergence
    assert found is not None
    return found.point


@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_pair_passes_and_a_fault_is_found(bench: Bench, tmp_path: Path, kind: str) -> None:
    model, (module, arguments) = make(kind, tmp_path / kind), PAIRS[kind]
    clean = compared(bench, model, **arguments)
    assert (clean.summary.verdict, clean.summary.failed) == ("pass", 0), clean.summary
    assert clean.summary.compared > 60
    assert [u for c in clean.coverage for u in c.unmatched] == []
    wrong = {"after_load": f"{HERE}spoil", "after_load_args": {"module": module}}
    assert first(compared(bench, model, **arguments, **wrong)) == module


def test_a_gate_inside_the_shared_expert_is_read(bench: Bench, tmp_path: Path) -> None:
    results = compared(bench, make("qwen2_moe", tmp_path / "qwen2_moe"))
    read = {f.point: f.reading for f in results.findings if f.reading}
    assert read == {
        f"model.layers.{n}.mlp.shared_expert": f"its output / sigmoid(model.layers.{n}.mlp.shared_expert_gate)"
        for n in range(3)
    }


@pytest.mark.xdist_group("bench")
@pytest.mark.parametrize(
    ("ending", "found"),
    [
        ("mlp.experts", "model.layers.0.mlp"),
        pytest.param("shared_expert.down_proj", "model.layers.0.mlp.shared_expert.down_proj", marks=pytest.mark.deep),
    ],
)
def test_a_fault_of_every_layer_beside_what_is_named_alike_is_not_put_there(
    tmp_path: Path, ending: str, found: str
) -> None:
    """What is computed from the shared expert is wrong everywhere then: the replay tells that not it is to blame."""
    plan = make_plan(
        str(make("qwen2_moe", tmp_path / "qwen2_moe")),
        given={"candidate": "vllm", "dtype": "float32"},
        checks=("modules", "logits"),
        case_names=("short", "long-40"),
        engine_args={"after_load": f"{HERE}spoil_each", "after_load_args": {"ending": ending}},
    )
    with plan.open() as session:
        results = session.results(plan.checks)
    assert first(results) == found
    assert {c.point for c in results.summary.culprits} == {found.replace(".0.", f".{n}.") for n in range(3)}


@pytest.mark.deep
def test_bloom_adds_its_residual_inside_and_has_another_gelu(bench: Bench, tmp_path: Path) -> None:
    model = make("bloom", tmp_path / "bloom")
    assert first(compared(bench, model)) == "transformer.h.0.mlp.gelu_impl"
    clean = compared(bench, model, after_load=f"{HERE}tanh")
    assert clean.summary.verdict == "pass", clean.summary
    read = {f.point.rpartition(".")[2] for f in clean.findings if f.reading}
    assert read == {"self_attention", "mlp"}


def test_an_engine_that_declares_nothing_is_mapped_by_its_weights(bench: Bench) -> None:
    model = tiny_model("qwen2")
    results = compared(bench, model, after_load=f"{HERE}declare_nothing")
    assert (results.summary.verdict, results.summary.unmatched) == ("pass", 0), results.summary
    (source,) = {f.mapping for f in results.findings if f.point == "model.layers.1.self_attn.k_proj"}
    assert source == "model.layers.1.self_attn.qkv_proj columns 128:192 (weight provenance)"


@pytest.fixture(scope="module")
def flat() -> tuple[Path, pk.Capture]:
    model = tiny_model("qwen2", num_hidden_layers=3)
    return model, pk.capture(pk.engine("hf", str(model), isolated=False), cases=CASES)


def test_a_block_that_is_no_mlp_is_not_compared_with_one(flat: tuple[Path, pk.Capture]) -> None:
    model, reference = flat
    found = pk.compare(reference=reference, candidate=pk.capture(engine(model), cases=CASES, follow=reference))
    assert (found.summary.verdict, found.summary.failed) == ("pass", 0), found.summary
    read = {f.point: f.reading for f in found.results.findings if f.point.endswith(".mlp")}
    assert read == {f"model.layers.{n}.mlp": f"blocks.{n}.down_proj" for n in range(3)}


@pytest.mark.parametrize("where", [0, 2])
def test_a_fault_in_such_a_block_is_found(flat: tuple[Path, pk.Capture], where: int) -> None:
    model, reference = flat
    wrong = engine(model, wrong=f"blocks.{where}.down_proj")
    found = pk.compare(reference=reference, candidate=pk.capture(wrong, cases=CASES, follow=reference))
    assert found.first_divergence is not None
    assert found.first_divergence.point == f"model.layers.{where}.mlp.down_proj"
