"""A clean engine passes and a mistake fails whatever the CPU: other machines' kernels, imitated in its process.

Which kernels a CPU's libraries take decides how sums are rounded. The reference ran with this machine's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

import paritykit as pk
from benchmarks.floor_calibration import environment
from paritykit.captures.recorder import Selection
from paritykit.results import Results
from paritykit.testing import tiny_model
from paritykit.testing.faults import planted
from paritykit.testing.scoreboard.ground import fed
from tests.floors import Floors
from tests.nano import one_thread

FAMILY = "qwen2"
MACHINES = {
    "plain instructions": {"ATEN_CPU_CAPABILITY": "default"},
    "older instructions": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "one thread, oneDNN's oldest": {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "any CPU's kernels, three threads": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "3"},
}
"""What torch, oneDNN and MKL are told: less than this CPU has, which any can be."""


@pytest.fixture(scope="module")
def floors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Floors]:
    with one_thread():
        yield Floors(tmp_path_factory.mktemp("machines"))


def judged(floors: Floors, machine: str, dtype: str, *, fault: str = "") -> Results:
    truth = floors.truth(FAMILY, dtype)
    with environment(MACHINES[machine]):
        engine = pk.engine("nano", str(tiny_model(FAMILY)), dtype=dtype, provenance=False)
        engine.open()
    try:
        with planted(engine, fault, layer=1) if fault else nullcontext():
            candidate = engine.run(fed(truth), points=Selection(), out=floors.ground.scratch())
    finally:
        engine.close()
    return floors.compare(FAMILY, candidate, dtype=dtype)


@pytest.mark.xdist_group("machines")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_clean_engine_passes_with_room_to_spare(floors: Floors, machine: str, dtype: str) -> None:
    results = judged(floors, machine, dtype)
    assert results.summary.verdict == "pass", results.summary
    assert max(f.needs.get("factor", 0.0) for f in results.findings) < 1.2, "1.5 are allowed"


@pytest.mark.xdist_group("machines")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("machine", ["plain instructions", "any CPU's kernels, three threads"])
def test_a_mistake_fails_at_its_place(floors: Floors, machine: str, dtype: str) -> None:
    first = judged(floors, machine, dtype, fault="rope-theta").summary.first_divergence
    assert first is not None
    assert (first.point, first.origin) == ("model.layers.1.self_attn", "introduced")
