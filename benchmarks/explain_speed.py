"""What diagnosis costs beside one more candidate: replaying and explaining against starting, running and comparing it.

    python -m benchmarks.explain_speed [--model tiny 8x512] [--fault head-permuted ...] [--rounds 3] [--busy]
                                       [--engine nano|vllm] [--dtype float32] [--folder /dev/shm]

Each fault is planted in an engine that is opened, run with everything recorded (a ragged batch of 200 positions, 4 of
them decoded) and compared (checks ``modules`` and ``logits``) as in `paritykit run`; then its modules are replayed and
its causes looked for, which is all that ``--no-explain`` leaves out. ``tiny`` are models of ParityKit's own, ``8x512``
the same families with 8 layers of 512 features. One thread; medians of all rounds; nano in this process, so that its
start has no interpreter's in it. ``--busy`` counts CPU time, of this process alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare_speed import seconds
from paritykit.case import Case
from paritykit.config import load_config
from paritykit.diagnose.locate import first_divergence, first_failure
from paritykit.engines import engine
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.records import explain_findings
from paritykit.reference import ABOVE, Reference, Role
from paritykit.replays import Replays
from paritykit.results import Finding
from paritykit.runner import run_checks
from paritykit.session import Session
from paritykit.testing import tiny_model
from paritykit.testing.faults import find

LAYER = 1
FAULTS = {
    "rope-theta": "qwen2",
    "norm-eps": "qwen2",
    "attention-scale": "qwen2",
    "gate-and-up-exchanged": "qwen2",
    "key-rows-permuted": "qwen2",
    "kv-table-rows-swapped": "qwen2",
    "residual-scaled": "qwen2",
    "linear-in-half-precision": "qwen2",
    "head-permuted": "qwen2",
    "experts-not-renormalised": "mixtral",
    "experts-fed-the-residual": "mixtral",
}
"""Faults of all areas, each with the family it is planted in."""
WIDE = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4099,
}
MODELS: dict[str, dict[str, Any]] = {"tiny": {}, "8x512": WIDE}
LENGTHS = (120, 50, 26)
"""Tokens of the prompts, submitted as one batch; the first two are decoded on, two tokens each."""
PARTS = ("start", "run", "compare", "replay", "explain")
AGAINST: tuple[tuple[str, ...], ...] = (PARTS[:3], PARTS[:2])
"""What diagnosis is held against: one more candidate, and that without comparing it."""
CLOCKS: dict[bool, Callable[[], float]] = {False: time.perf_counter, True: time.process_time}


class Bench:
    """One model, and what its reference computes, made once."""

    def __init__(self, family: str, sizes: dict[str, Any], folder: Path, *, dtype: str) -> None:
        self.dtype, self.folder = dtype, folder
        self.model = tiny_model(family, folder / "model", **sizes)
        self.checkpoint = Checkpoint.find(str(self.model))
        self.cases = make_cases(self.checkpoint.vocab_size)
        self.reference = Reference(
            truth=Role(engine=HFEngine(str(self.model), dtype=ABOVE[dtype], weights_dtype=dtype)),
            twin=Role(engine=HFEngine(str(self.model), dtype=dtype)),
        )
        self.reference.prepare(folder=folder, cases=self.cases, progress=None)
        assert self.reference.twin_capture is not None

    def measure(self, name: str, fault: str, clock: Callable[[], float]) -> tuple[dict[str, float], str]:
        """Seconds of each part, and what is said to be wrong."""
        found = find(fault)
        arguments = {"dtype": self.dtype, **found.when.arguments, **found.arguments(layer=LAYER)}
        candidate = engine(name, str(self.model), isolated=name != "nano", **arguments)
        session = Session(
            reference=self.reference,
            candidate=candidate,
            cases=self.cases,
            config=load_config({}, environ={}),
            checkpoint=self.checkpoint,
        )
        parts: dict[str, float] = {}
        findings: list[Finding] = []

        def timed(part: str, work: Callable[[], Any]) -> None:
            parts[part] = seconds(work, clock=clock)

        with session:
            timed("start", lambda: session.candidate_args)
            timed("run", lambda: session.candidate)
            timed("compare", lambda: findings.extend(run_checks(session.subject, ("modules", "logits"))[1]))
            replays = Replays(session.subject, candidate)
            timed("replay", lambda: findings.__setitem__(slice(None), replays.explain(findings)))
            explain = partial(explain_findings, subject=session.subject, checkpoint=self.checkpoint)
            timed("explain", lambda: findings.__setitem__(slice(None), explain(findings)))
        return parts, told(findings)


def make_cases(vocabulary: int) -> list[Case]:
    """A ragged batch; the first two cases go on to be decoded."""
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()) for n in LENGTHS]
    return [Case(id=f"of-{len(t)}", tokens=t, new_tokens=3 if n < 2 else 0) for n, t in enumerate(drawn)]


def told(findings: list[Finding]) -> str:
    """The first cause and where, as the summary has it."""
    where, first = first_divergence(findings), first_failure(findings)
    if where is None or first is None:
        return "nothing fails"
    return f"{first.causes[0].name if first.causes else 'no cause'} at {where.point}"


def ratio(parts: dict[str, float], *, against: tuple[str, ...]) -> float:
    """Diagnosis over these parts."""
    return (parts["replay"] + parts["explain"]) / sum(parts[p] for p in against)


def report(rows: dict[str, list[tuple[dict[str, float], str]]]) -> None:
    """A line a fault, and the worst ratios last."""
    print(f"  {'milliseconds':<26}" + "".join(f"{p:>9}" for p in PARTS) + "   / all  / start + run")
    worst: dict[tuple[str, ...], tuple[float, str]] = {}
    for fault, rounds in rows.items():
        line = f"  {fault:<26}" + "".join(f"{1e3 * statistics.median(r[p] for r, _ in rounds):9.0f}" for p in PARTS)
        for against in AGAINST:
            found = statistics.median(ratio(r, against=against) for r, _ in rounds)
            worst[against] = max(worst.get(against, (0.0, "")), (found, fault))
            line += f"{found:8.2f}"
        print(f"{line}   {rounds[-1][1]}")
    for against, (found, fault) in worst.items():
        print(f"  worst: {found:.2f} x {' + '.join(against)} ({fault})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--fault", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--engine", default="nano", choices=["nano", "vllm"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="CPU time: where the machine has other work")
    parser.add_argument("--folder", help="where captures and models are written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.model:
        print(name)
        rows: dict[str, list[tuple[dict[str, float], str]]] = {f: [] for f in asked.fault}
        for family in dict.fromkeys(FAULTS[f] for f in asked.fault):
            with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
                bench = Bench(family, MODELS[name], Path(folder), dtype=asked.dtype)
                for turn in range(asked.rounds + 1):
                    for fault in (f for f in asked.fault if FAULTS[f] == family):
                        measured = bench.measure(asked.engine, fault, CLOCKS[asked.busy])
                        rows[fault] += [measured] if turn else []
        report(rows)


if __name__ == "__main__":
    main()
