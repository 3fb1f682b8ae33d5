"""The noise floor as the only tolerance: clean engines pass, small mistakes fail, and a broken reference is named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paritykit.cli import execute
from paritykit.floor_file import read_floor, write_floor
from paritykit.results import Finding, Results
from paritykit.testing import TINY_FAMILIES, nano_families
from paritykit.testing.faults import FAULTS, Fault
from tests.faulty import MODELS
from tests.floors import NANO, TRAINED, Floors, model_of
from tests.integration.conftest import Bench
from tests.nano import one_thread

DENSE = [f for f in TINY_FAMILIES if f not in ("mixtral", "qwen3_moe")]
IN_CI = ("qwen2", "gemma2")
KEPT = sorted((Path(__file__).parents[2] / "references").glob("*.json"))
deep = pytest.mark.deep


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def floors(tmp_path_factory: pytest.TempPathFactory) -> Floors:
    return Floors(tmp_path_factory.mktemp("floors"))


def some(families: Any) -> list[Any]:
    group = pytest.mark.xdist_group("floors")
    return [pytest.param(f, marks=[group] if f in IN_CI else [group, deep]) for f in families]


def some_trained(families: Iterable[str]) -> list[Any]:
    group = pytest.mark.xdist_group("real")
    return [pytest.param(f, marks=[group] if f == TRAINED[0] else [group, deep]) for f in families]


def in_nano(family: str) -> bool:
    return family.removeprefix("smollm2_") in nano_families()


def judged(results: Results) -> list[Finding]:
    return [f for f in results.findings if f.check != "tokens"]


def assert_by_the_floor(results: Results) -> None:
    assert results.summary.verdict == "pass", results.summary
    assert all("noise" in f.allowed_source and f.noise_floor is not None for f in judged(results))
    assert all(f.needs.get("factor", 0.0) < 1.6 for f in judged(results)), "twice the floor has room to spare"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", [*some(NANO), *some_trained(f for f in TRAINED if in_nano(f))])
def test_nano_passes_by_the_floor_alone(floors: Floors, family: str, dtype: str) -> None:
    candidate = floors.nano(family, floors.truth(family, dtype), dtype=dtype)
    assert_by_the_floor(floors.compare(family, candidate, dtype=dtype))


@pytest.mark.xdist_group("floors")
def test_what_is_decoded_token_by_token_is_held_against_a_floor_of_its_own_kind(floors: Floors) -> None:
    """nano computes the three cases together. Against what the twin decoded alone, a factor of 1.3 is needed."""
    names = ("one", "short", "long-40")
    candidate = floors.nano("gemma3", floors.truth("gemma3", "float32", names=names), dtype="float32")
    results = floors.compare("gemma3", candidate, dtype="float32", names=names)
    assert results.summary.verdict == "pass"
    assert max(f.needs.get("factor", 0.0) for f in judged(results)) < 1.0


@pytest.mark.parametrize("fault", ["norm-eps", "norm-in-half-precision"])
@pytest.mark.parametrize("family", some(NANO))
def test_a_small_mistake_in_one_norm_fails_in_bfloat16(floors: Floors, family: str, fault: str) -> None:
    """In the first layer: further on, what bfloat16 has done to the input is larger than what is wrong."""
    candidate = floors.nano(family, floors.truth(family, "bfloat16"), dtype="bfloat16", fault=fault, layer=0)
    results = floors.compare(family, candidate, dtype="bfloat16", checks=("modules",))
    first = results.summary.first_divergence
    assert results.summary.verdict == "fail"
    assert first is not None
    assert (first.point, first.origin) == ("model.layers.0.input_layernorm", "introduced")


@pytest.mark.parametrize("fault", ["norm-eps", "norm-in-half-precision"])
@pytest.mark.parametrize("layer", [1, pytest.param(3, marks=deep)])
def test_in_float32_a_small_mistake_fails_in_any_layer(floors: Floors, fault: str, layer: int) -> None:
    truth = floors.truth("qwen2", "float32")
    candidate = floors.nano("qwen2", truth, dtype="float32", fault=fault, layer=layer)
    first = floors.compare("qwen2", candidate, dtype="float32", checks=("modules",)).summary.first_divergence
    assert first is not None
    assert first.point == f"model.layers.{layer}.input_layernorm"


GRADED = [f for _, f in FAULTS.items() if f.graded and f.stage == "live" and "nano" in f.engines]
QUICK = ("rope-theta", "residual-dropped")
SHORT = ("long-40",)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=deep)])
@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name, marks=[] if f.name in QUICK else [deep]) for f in GRADED])
@pytest.mark.xdist_group("floors")
def test_a_fault_at_ten_times_the_floor_is_found(floors: Floors, fault: Fault, dtype: str) -> None:
    """Its strength is cut until its point is off by ten times its noise floor."""
    family = next((f for f in NANO if f in MODELS and not MODELS[f][1] and 1 in fault.layers(config(f))), None)
    if family is None or fault.when.arguments or not fault.at(layer=1):
        pytest.skip("shows under conditions of its own, or in no model here")
    full = planted_point(floors, family, fault, dtype, strength=1.0)
    ratio = full.metrics["floor_ratio"] or 0.0
    if ratio < 10:
        pytest.skip(f"at full strength it is {ratio:.1f} times the floor")
    weak = planted_point(floors, family, fault, dtype, strength=10 / ratio)
    assert (full.verdict, weak.verdict) == ("fail", "fail")
    assert (weak.metrics["floor_ratio"] or 0.0) < max(40, ratio / 2), "a strength that does nothing"


def config(family: str) -> dict[str, Any]:
    from paritykit.testing import tiny_config

    return tiny_config(family)


def planted_point(floors: Floors, family: str, fault: Fault, dtype: str, *, strength: float) -> Finding:
    truth = floors.truth(family, dtype, names=SHORT)
    candidate = floors.nano(family, truth, dtype=dtype, fault=fault.name, layer=1, strength=strength)
    results = floors.compare(family, candidate, dtype=dtype, names=SHORT, checks=("modules", "logits"))
    at = [f for f in results.findings if f.point == fault.at(layer=1) and f.check in ("modules", "logits")]
    return max(at, key=lambda f: f.metrics.get("floor_ratio") or 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("qwen2", 1),
        *(pytest.param(f, 1, marks=deep) for f in DENSE if f != "qwen2"),
        *(pytest.param(f, 2, marks=deep) for f in ("qwen2", "gemma2", "phi3")),
        *(pytest.param(f, 1, marks=[deep, pytest.mark.xdist_group("real")]) for f in TRAINED),
    ],
)
def test_vllm_passes_by_the_floor_alone(bench: Bench, floors: Floors, family: str, ranks: int, dtype: str) -> None:
    truth = floors.truth(family, dtype)
    candidate = bench.candidate(model_of(family), truth, dtype=dtype, tensor_parallel_size=ranks)
    assert_by_the_floor(floors.compare(family, candidate, dtype=dtype))


@pytest.mark.parametrize("family", some(("qwen2", "gemma2")))
def test_transformers_own_attention_is_a_candidate_like_any(floors: Floors, family: str) -> None:
    """Gemma 2 has softcaps, which sdpa leaves out: what is broken there is not the candidate's doing."""
    other = floors.another_twin(family, "bfloat16", attn_implementation="sdpa")
    results = floors.compare(family, other, dtype="bfloat16")
    assert results.summary.verdict == ("fail" if family == "gemma2" else "pass")


@pytest.mark.parametrize("kept", [pytest.param(p, id=p.stem) for p in KEPT])
@pytest.mark.xdist_group("floors")
def test_kept_floors_have_not_moved(kept: Path, tmp_path: Path) -> None:
    """Of a checkpoint that these numbers are not of, nothing can be said: that fails too."""
    model, dtype = kept.stem.removeprefix("tiny-").rsplit("-", 1)
    assert execute(["floor", f"tiny:{model}", "--dtype", dtype, "--no-cache", "--quiet", "--against", str(kept)]) == 0
    moved = read_floor(kept)
    moved.floors["model.norm"]["short"] *= 2
    write_floor(moved, tmp_path / "moved.json")
    assert execute(["floor", f"tiny:{model}", "--dtype", dtype, "--quiet", "--against", str(tmp_path / "moved.json")])
