"""The fault table in real vLLM: each fault is reported at its place by the checks that must, and is gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paritykit.engines.process import ProcessEngine
from paritykit.errors import UsageError
from paritykit.results import Results
from paritykit.testing.faults import FAULTS, Fault, find, planted
from tests.faulty import Ground, Trial, differences, homes

LIVE = [f for _, f in FAULTS.items() if f.stage == "live" and "vllm" in f.engines]
IN_CI = (
    "rope-theta", "norm-eps", "attention-scale", "mask-bidirectional", "gate-up-swapped", "bias-missing",
    "residual-dropped", "residual-dropped-after-mlp", "head-permuted", "logits-scaled", "kv-write-lost", "null-forward",
    "null-attention", "null-rotation",
)  # fmt: skip
ON_GEMMA = ("rope-theta", "norm-eps", "gate-up-swapped", "residual-dropped")
BESIDE = {name: {"model.layers.1.mlp.up_proj"} for name in ("gate-up-swapped", "gate-up-interleaved")}
"""Modules that are wrong by the same mistake."""
LAYER = 1


class Vllm(ProcessEngine):
    """In a process of its own: two of them can be open at once."""

    def __init__(self, model: str, **arguments: Any) -> None:
        super().__init__("vllm", model, arguments)


@pytest.fixture(scope="module")
def ground(importable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    found = Ground(tmp_path_factory.mktemp("captures"), kind=Vllm, room=1)
    yield found
    found.close()


def in_ci(fault: Fault, name: str) -> bool:
    return fault.name in {"qwen2": IN_CI, "gemma2": ON_GEMMA}.get(name, ())


def ordered() -> list[Any]:
    """Each fault in each model it fits; those of one engine follow each other, since one is open at a time."""
    found = [(f, name) for f in LIVE for name in homes(f)]
    found.sort(key=lambda item: (not in_ci(*item), item[1], str(sorted(item[0].when.arguments.items()))))
    group = pytest.mark.xdist_group("vllm-faults")
    return [
        pytest.param(f, name, id=f"{f.name}-{name}", marks=[group] if in_ci(f, name) else [group, pytest.mark.deep])
        for f, name in found
    ]


def shown(results: Results, point: str) -> set[str]:
    """A promised point, and the nearest module around it that vLLM shows."""
    seen, around = {f.point for f in results.findings}, point
    while around and around not in seen and not around.startswith("#"):
        around = around.rpartition(".")[0]
    return {point, around}


@pytest.mark.parametrize(("fault", "name"), ordered())
def test_a_fault_is_reported_where_it_is_and_gone_afterwards(ground: Ground, fault: Fault, name: str) -> None:
    made = Trial(ground, fault, name, homes(fault)[name])
    clean, wrong = made.clean(), made.planted()
    results = made.compare(wrong)
    if fault.kind == "null":
        assert differences(clean, wrong) == {}
        assert results.summary.verdict == "pass"
        return
    places, first = shown(results, fault.at(layer=made.layer)), results.summary.first_divergence
    assert first is not None
    assert places & {first.point, first.seen_at}, first
    assert first.origin != "inherited"
    introduced = {f.located for f in results.findings if f.check == "modules" and f.origin == "introduced"}
    assert introduced <= places | BESIDE.get(fault.name, set())
    failed = {f.check for f in results.findings if f.verdict == "fail"}
    assert set(fault.checks) & {"modules", "logits"} <= failed
    if fault.when.only == "decode":
        assert differences(clean, wrong, prefill=True) == {}
    assert differences(clean, ground.run(made.engine, made.cases)) == {}


@pytest.mark.xdist_group("vllm-faults")
def test_a_fault_that_does_not_fit_is_refused_by_its_workers(ground: Ground) -> None:
    made = Trial(ground, find("rope-theta"), "qwen2", LAYER)
    with pytest.raises(UsageError, match="sliding window"), planted(made.engine, "window-missing", layer=LAYER):
        pass
    assert differences(made.clean(), ground.run(made.engine, made.cases)) == {}


@pytest.mark.deep
@pytest.mark.xdist_group("vllm-faults")
@pytest.mark.parametrize("name", ["norm-eps", "prefix-hit-too-long"])
def test_arguments_plant_what_the_block_plants(ground: Ground, name: str) -> None:
    made = Trial(ground, find(name), "qwen2", LAYER)
    clean, wrong = made.clean(), made.planted()
    assert differences(clean, wrong)
    engine = ground.engine(Path(made.model), **made.fault.when.arguments, **made.fault.arguments(layer=LAYER))
    assert differences(wrong, ground.run(engine, made.cases)) == {}
