"""Clean pairs of architectures that no test knows by name, on real vLLM.

``PARITYKIT_SEED=7 PARITYKIT_SAMPLE=12 tox run -e deep -- tests/integration/test_drawn_pairs.py`` draws others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from benchmarks.matrix.command import DTYPES
from benchmarks.matrix.row import Row, Task
from benchmarks.matrix.sweep import Worker
from paritykit.testing.drawn.catalogue import sample, vllm_classes

SEED = int(os.environ.get("PARITYKIT_SEED", "0"))
SIZE = int(os.environ.get("PARITYKIT_SAMPLE", "6"))
SECONDS = 600.0


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker("tests", tmp_path_factory.mktemp("matrix") / "worker.log")
    yield made
    made.stop()


@pytest.mark.deep
def test_a_fresh_sample_gives_no_false_alarm(worker: Worker) -> None:
    names = sample(list(vllm_classes()), SIZE, seed=SEED)
    tasks = [Task(model_type=name, dtype=dtype, seed=SEED) for name in names for dtype in DTYPES]
    rows = [worker.run(task, seconds=SECONDS) for task in tasks]
    print("\n".join(line(r) for r in rows))
    assert not [line(r) for r in rows if r.outcome == "error"], "mistakes of ParityKit's own"
    assert not [line(r) for r in rows if r.false_alarm], "failures of which nothing comes out"
    assert any(r.outcome == "pass" for r in rows), "\n".join(line(r) for r in rows)


def line(row: Row) -> str:
    return f"{row.task.name} {row.task.dtype}: {row.outcome} {row.first or row.reason} {' '.join(row.causes)}".strip()


@pytest.mark.deep
def test_a_pair_that_takes_too_long_could_not_run_and_the_next_runs(worker: Worker) -> None:
    slow = worker.run(Task(model_type="llama", dtype="float32"), seconds=0.01)
    assert (slow.outcome, slow.reason) == ("could not run", "it took longer than 0.01 s")
    assert worker.run(Task(model_type="llama", dtype="float32"), seconds=SECONDS).outcome == "pass"
