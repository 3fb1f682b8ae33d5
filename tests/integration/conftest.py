"""Real engines, shared: one process for each side, one reference capture for each model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paritykit.captures.reader import Capture, let_go
from paritykit.captures.recorder import Selection
from paritykit.case import cases
from paritykit.config import load_config
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.process import HostProcess, ProcessEngine
from paritykit.ledger.judge import Judged, judge_weights
from paritykit.provenance.weightmap import RankLedger
from paritykit.results import Results
from paritykit.runner import compare_captures, weight_subject
from paritykit.testing import tiny_model
from paritykit.testing.faults import find

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share engines stay with one worker."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "bench" in fixtures or "yard" in fixtures:
            item.add_marker(pytest.mark.xdist_group("bench" if "bench" in fixtures else "yard"))


@pytest.fixture(scope="session", autouse=True)
def importable() -> None:
    """Engine processes import the planted mistakes from this tree."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def hosts(importable: None) -> Iterator[dict[str, HostProcess]]:
    found = {"hf": HostProcess(), "vllm": HostProcess(), "vllm-tp": HostProcess()}
    yield found
    for host in found.values():
        host.stop()


class Bench:
    """Runs engines on tiny models and compares them; references are kept."""

    def __init__(self, hosts: dict[str, HostProcess], folder: Path) -> None:
        self._hosts = hosts
        self._folder = folder
        self._references: dict[str, Capture] = {}
        self._count = 0
        self.ledgers: dict[str, list[RankLedger]] = {}

    def reference(self, model: Path, *, names: tuple[str, ...] = ("smoke",), **arguments: Any) -> Capture:
        key = f"{model.name}{names}{arguments}"
        if key not in self._references:
            checkpoint = Checkpoint.find(str(model))
            todo = cases(*names).resolve(vocab_size=checkpoint.vocab_size, max_positions=checkpoint.max_positions)
            self._references[key] = self.run("hf", model, todo, {"dtype": "float32", **arguments})
        return self._references[key]

    def candidate(self, model: Path, reference: Capture, *, follow: bool = True, **arguments: Any) -> Capture:
        todo = list(reference.cases.values())
        fed = [c.force(reference.generated(c.id)) for c in todo] if follow else todo
        kind = "vllm-tp" if arguments.get("tensor_parallel_size", 1) > 1 else "vllm"
        return self.run(kind, model, fed, {"dtype": "float32", **arguments})

    def compare(self, model: Path, *, checks: list[str] | None = None, **arguments: Any) -> Results:
        reference = self.reference(model)
        candidate = self.candidate(model, reference, **arguments)
        return compare_captures(reference, candidate, checks=checks, config=load_config({}, environ={}))

    def run(self, kind: str, model: Path, todo: list[Any], arguments: dict[str, Any]) -> Capture:
        self._count += 1
        engine = ProcessEngine(kind.removesuffix("-tp"), str(model), arguments, host=self._hosts[kind])
        engine.open()
        try:
            if "ledger" in engine.capabilities:
                self.ledgers[str(model)] = engine.ledger()
            return let_go(engine.run(todo, points=Selection(), out=self._folder / f"{self._count}"))
        finally:
            engine.close()


@pytest.fixture(scope="session")
def bench(hosts: dict[str, HostProcess], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(hosts, tmp_path_factory.mktemp("captures"))


class Yard:
    """Loads models, and judges where their weights went; for each number of ranks one process."""

    def __init__(self) -> None:
        self._hosts = {ranks: HostProcess() for ranks in (1, 2)}

    def load(self, model: Path, *, ranks: int = 1, fault: str = "", **arguments: Any) -> Judged:
        arguments |= {"dtype": arguments.get("dtype", "float32"), "tensor_parallel_size": ranks}
        if fault:
            arguments |= find(fault).arguments(layer=2)
        engine = ProcessEngine("vllm", str(model), arguments, host=self._hosts[ranks])
        engine.open()
        try:
            return judge_weights(weight_subject(engine.ledger(), Checkpoint.find(str(model)), dtype=arguments["dtype"]))
        finally:
            engine.close()

    def stop(self) -> None:
        for host in self._hosts.values():
            host.stop()


@pytest.fixture(scope="session")
def yard(importable: None) -> Iterator[Yard]:
    found = Yard()
    yield found
    found.stop()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Path]:
    return tiny_model
