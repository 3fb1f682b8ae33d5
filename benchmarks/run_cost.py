"""What a run costs beside its engines alone: the same cases in Hugging Face in both dtypes and in the candidate.

CPU seconds of all processes, and seconds by the clock, for each part and in all; the ratio is of one round, so it holds
while the machine's speed drifts. ``python -m benchmarks.run_cost real:smollm2 --dtype bfloat16``
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from paritykit.captures.recorder import Selection
from paritykit.engines.process import HostProcess, ProcessEngine
from paritykit.plan import Plan, make_plan


class Cost:
    """CPU seconds and seconds by the clock."""

    def __init__(self, cpu: float, wall: float) -> None:
        self.cpu, self.wall = cpu, wall


def cost_of(work: Callable[[], object]) -> Cost:
    """What ``work`` takes, with every process that it starts and ends."""
    before, started = _cpu(), time.perf_counter()
    work()
    return Cost(_cpu() - before, time.perf_counter() - started)


def _cpu() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usages)


def bare(plan: Plan) -> None:
    """The engines alone, nothing recorded: each starts, runs the cases and ends."""
    candidate = {"dtype": plan.config["dtype"], **plan.engine_args}
    todo = [
        ("hf", {"dtype": plan.truth_arguments()["dtype"]}),
        ("hf", {"dtype": plan.config["dtype"]}),
        (plan.config["candidate"], candidate),
    ]
    for name, arguments in todo:
        host = HostProcess()
        engine = ProcessEngine(name, str(plan.checkpoint.path), arguments, host=host)
        with tempfile.TemporaryDirectory(prefix="paritykit-") as folder:
            try:
                engine.open()
                engine.run(plan.resolve_cases(), points=Selection(()), out=Path(folder) / "capture")
            finally:
                host.stop()


def whole(plan: Plan) -> None:
    """The run with its default checks, nothing kept from before."""
    with plan.open() as session:
        results = session.results(plan.checks)
    summary = results.summary
    print(f"{summary.verdict}: compared {summary.compared}, failed {summary.failed}, starts {results.run.starts}")


def main() -> None:
    """Measure and print, one line for each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--candidate", default="vllm")
    parser.add_argument("--rounds", type=int, default=1)
    chosen = parser.parse_args()
    given = {"candidate": chosen.candidate, "dtype": chosen.dtype, "cache": "off"}
    for _ in range(chosen.rounds):
        plan = make_plan(chosen.model, given=given)
        alone, run = cost_of(lambda: bare(plan)), cost_of(lambda: whole(plan))  # noqa: B023
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(
            f"engines alone: {alone.cpu:.1f} s CPU, {alone.wall:.1f} s   run: {run.cpu:.1f} s CPU, {run.wall:.1f} s   "
            f"ratio: {run.cpu / alone.cpu:.2f} CPU, {run.wall / alone.wall:.2f}   largest process: {peak:.1f} GiB"
        )


if __name__ == "__main__":
    main()
