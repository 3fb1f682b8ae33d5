"""What correct engines do beside the ensemble: the figures that the noise floor's constants rest on.

Every candidate here computes the same function as the reference, by other legitimate ways: other attention, padded
batches, nano, vLLM, other vector instructions, other libraries' kernels, other numbers of threads. For each judged
number: how many were compared, how far the most extreme one is beyond the draws' typical one, and beyond what chance
allows (the factor it would need). ``python -m benchmarks.floor_calibration tiny:qwen2 real:smollm2 --dtype float32``
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.checks.base import Subject
from paritykit.checks.floors import FloorMeter, drawn_at
from paritykit.comparison.align import pairs, shared_places
from paritykit.comparison.drawn import drawn_guards
from paritykit.comparison.floor import half_ulp
from paritykit.engines.process import HostProcess, ProcessEngine
from paritykit.errors import ParityError
from paritykit.mapping.build import build_mapping
from paritykit.plan import make_plan

WAYS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "sdpa": ("hf", {"attn_implementation": "sdpa"}, {}),
    "padded": ("hf", {"padding": "left"}, {}),
    "plain instructions": ("hf", {}, {"ATEN_CPU_CAPABILITY": "default"}),
    "compatible kernels": ("hf", {}, {"MKL_CBWR": "COMPATIBLE", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    "oldest oneDNN": ("hf", {}, {"ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}),
    "three threads": ("hf", {}, {"OMP_NUM_THREADS": "3"}),
    "nano": ("nano", {}, {}),
    "vllm": ("vllm", {"provenance": False}, {}),
}
"""Engine, its arguments, and the environment that stands for another machine."""


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """These variables, for processes that start now."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def measured(subject: Subject) -> Iterator[tuple[str, float, float, str]]:
    """(metric, times the typical draw, factor needed, where) of every number of a candidate's."""
    for rule in subject.mapping.rules:
        for case in subject.reference.cases:
            places = shared_places(rule, subject.reference, subject.candidate, case)
            draws = drawn_at(subject, rule, case, places)
            if draws is None or not draws.whole.any():
                continue
            meter = FloorMeter(subject.twin, point=rule.reference, case=case)
            for position, left, right in pairs(rule, subject.reference, subject.candidate, case):
                meter.update(position, left, right)
            noise = meter.result()
            if noise is not None:
                least = half_ulp(subject.dtypes(rule)[1])
                for guard in drawn_guards(noise, draws, least=least, chance=subject.luck(rule.reference)):
                    yield guard.metric, guard.value / guard.floor, guard.beyond, f"{rule.reference} / {case}"


def candidates(
    model: str, dtype: str, ways: list[str], folder: Path, reference: Capture
) -> Iterator[tuple[str, Capture]]:
    """What each way gives on the reference's cases, fed its tokens; ways that do not run are told and left out."""
    forced = [c.force(reference.continuation(c.id)) for c in reference.cases.values()]
    for way in ways:
        name, arguments, changes = WAYS[way]
        with environment(changes):
            engine = ProcessEngine(name, model, {"dtype": dtype, **arguments}, host=(host := HostProcess()))
            try:
                engine.open()
                yield way, engine.run(forced, points=Selection(), out=folder / way.replace(" ", "-"))
            except ParityError as error:
                print(f"{way}: {str(error).splitlines()[0]}")
            finally:
                host.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--way", action="append", choices=list(WAYS), default=[])
    chosen = parser.parse_args()
    found: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for model in chosen.models:
        plan = make_plan(model, given={"candidate": "nano", "dtype": chosen.dtype}, case_names=chosen.case)
        with tempfile.TemporaryDirectory(prefix="paritykit-") as folder:
            reference = plan.reference()
            reference.prepare(folder=Path(folder), cases=plan.resolve_cases(), progress=None)
            try:
                truth, twin, ensemble = reference.capture, reference.twin_capture, reference.ensemble
                path = str(plan.checkpoint.path)
                for way, capture in candidates(path, chosen.dtype, chosen.way or list(WAYS), Path(folder), truth):
                    subject = Subject(
                        reference=truth,
                        candidate=capture,
                        mapping=build_mapping(truth.manifest, capture.manifest),
                        twin=twin,
                        ensemble=ensemble,
                    )
                    worst = 0.0
                    for metric, times, factor, where in measured(subject):
                        found[metric].append((times, factor, f"{model} {way}: {where}"))
                        worst = max(worst, factor)
                    print(f"{model} {chosen.dtype} {way}: factor {worst:.2f}", flush=True)
            finally:
                reference.close()
    print(f"{'number':18s} {'compared':>8s} {'times':>8s} {'median':>8s} {'factor':>8s}")
    for metric, numbers in found.items():
        ordered, (_, needed, where) = sorted(n[0] for n in numbers), max(numbers, key=lambda n: n[1])
        middle = ordered[len(ordered) // 2]
        print(f"{metric:18s} {len(numbers):8d} {ordered[-1]:8.2f} {middle:8.2f} {needed:8.2f}  {where}")


if __name__ == "__main__":
    main()
