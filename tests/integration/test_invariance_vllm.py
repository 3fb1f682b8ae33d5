"""Real vLLM against itself: quiet as it is, and each fault found under the condition it needs, where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import paritykit as pk
from paritykit.checks import CHECKS, INVARIANCES
from paritykit.checks.base import Answer, InvarianceCheck
from paritykit.diagnose.locate import first_divergence
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.process import HostProcess, ProcessEngine
from paritykit.errors import UsageError
from paritykit.session import Session
from paritykit.testing.faults import FAULTS, Fault, find, planted
from tests.faulty import VOCABULARY, homes, model_of
from tests.nano import one_thread

pytestmark = [pytest.mark.deep, pytest.mark.xdist_group("vllm-invariance")]
BLOCK = 32
CASES = ("len-94+6", "len-36+3@b", "len-5+3", "len-1+2")
"""The first goes over the edge of its third block while it is decoded."""
VARIED = {"tensor_parallel_size", "pipeline_parallel_size", "enable_prefix_caching", "max_num_batched_tokens"}
"""Arguments of a fault's conditions that its check varies itself."""
NULL = ("null-forward", "null-parameter", "null-rotation", "null-attention", "null-loading")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


class Shelf:
    """Engines that stay open, one for each role and number of ranks: starts are what takes time."""

    def __init__(self) -> None:
        self._hosts: dict[tuple[str, int], HostProcess] = {}
        self._open: dict[tuple[str, int], tuple[str, ProcessEngine]] = {}

    def take(self, role: str, model: Path, arguments: dict[str, Any]) -> ProcessEngine:
        place = role, arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
        key, held = f"{model}{sorted(arguments.items())}", self._open.get(place)
        if held is not None and held[0] == key:
            return held[1]
        if held is not None:
            self._open.pop(place)[1].close()
        own = {"dtype": "float32", "provenance": False, **arguments}
        engine = ProcessEngine("vllm", str(model), own, host=self._hosts.setdefault(place, HostProcess()))
        engine.open()
        self._open[place] = key, engine
        return engine

    def stop(self) -> None:
        for host in self._hosts.values():
            host.stop()


class Planted:
    """An engine from the shelf, with a fault in it as long as it is open; taken back, it leaves nothing."""

    name = "vllm"

    def __init__(self, take: Callable[[], ProcessEngine], fault: Fault | None, *, layer: int) -> None:
        self._take, self._fault, self._layer = take, fault, layer
        self._engine: Any = None
        self._planted = ExitStack()

    def open(self) -> None:
        self._engine = self._take()
        if self._fault is not None:
            self._planted.enter_context(planted(self._engine, self._fault, layer=self._layer))

    def close(self) -> None:
        self._planted.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.fixture(scope="module")
def shelf(importable: None) -> Iterator[Shelf]:
    found = Shelf()
    yield found
    found.stop()


@pytest.fixture
def session(shelf: Shelf) -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def make(
        model: Path, fault: Fault | None = None, *, layer: int = 1, cases: list[pk.Case] | None = None, **given: Any
    ) -> Session:
        own, live = {"block_size": BLOCK, **given}, fault
        if fault is not None and fault.stage == "loading":
            own, live = {**own, **fault.arguments(layer=layer)}, None

        def engine(role: str, more: dict[str, Any]) -> Any:
            return Planted(partial(shelf.take, role, model, {**own, **more}), live, layer=layer)

        made = Session(
            reference=HFEngine(str(model)),
            candidate=engine("own", {}),
            cases=cases or pk.cases(*CASES).resolve(vocab_size=VOCABULARY),
            checkpoint=Checkpoint.find(str(model)),
            vary=partial(engine, "varied"),
        )
        opened.append(made)
        return made

    yield make
    for each in opened:
        each.close()


def vary(session: Session, name: str) -> Answer:
    check = CHECKS.get(name)
    assert isinstance(check, InvarianceCheck)
    return session.vary(check)


@pytest.mark.parametrize("home", ["qwen2", "gemma2"])
def test_quiet_as_it_is(session: Callable[..., Session], home: str) -> None:
    ran = session(model_of(home))
    for name in INVARIANCES:
        answer = vary(ran, name)
        assert [f for f in answer.findings if f.verdict != "pass"] == [], name
        assert {f.case for f in answer.findings} == set(CASES), name
        assert not answer.coverage.skipped, name
        assert answer.coverage.compared > 1, name


@pytest.mark.parametrize("name", NULL)
def test_quiet_where_nothing_is_planted(session: Callable[..., Session], name: str) -> None:
    ran = session(model_of("qwen2"), find(name))
    for check in ("batching", "decode_prefill"):
        answer = vary(ran, check)
        assert answer.findings
        assert [f for f in answer.findings if f.verdict != "pass"] == [], check


def every_fault() -> list[Any]:
    """Each check with each fault that it must find; those of one engine follow each other."""
    found = [
        (check, fault, *next(iter(homes(fault).items())))
        for check in INVARIANCES
        for _, fault in FAULTS.items()
        if check in fault.checks and "vllm" in fault.engines and fault.stage != "checkpoint"
    ]
    found.sort(key=lambda item: (item[1].stage == "loading", item[2], "num_blocks" in item[1].when.arguments))
    return [pytest.param(*item, id=f"{item[0]}-{item[1].name}") for item in found]


@pytest.mark.parametrize(("check", "fault", "home", "layer"), every_fault())
def test_a_fault_is_found_under_its_condition(
    session: Callable[..., Session], check: str, fault: Fault, home: str, layer: int
) -> None:
    conditions = conditions_of(fault)
    crowded = "num_gpu_blocks_override" in conditions
    cases = fault.when.cases(vocab_size=VOCABULARY) if crowded else None
    answer = vary(session(model_of(home), fault, layer=layer, cases=cases, **conditions), check)
    first = first_divergence(answer.findings)
    assert first is not None, f"{check} does not see {fault.name}"
    assert first.origin != "inherited"
    places = {place.partition("#")[0] for place in (first.point, first.seen_at)}
    assert places & shown(answer, fault.at(layer=layer)), first


@pytest.mark.parametrize(("ranks", "fault", "why"), [
    (1, "block-freed-early", "can be planted in nano, not in vllm"),
    (2, "prefix-hit-too-long", "schedules in a process of its own"),
])  # fmt: skip
def test_what_cannot_be_planted_in_its_scheduler_is_a_usage_error(
    shelf: Shelf, ranks: int, fault: str, why: str
) -> None:
    engine = shelf.take("varied", model_of("qwen2"), {"block_size": BLOCK, "tensor_parallel_size": ranks})
    with pytest.raises(UsageError, match=why), planted(engine, fault, layer=1):
        pass


def conditions_of(fault: Fault) -> dict[str, Any]:
    """The arguments of a fault's conditions as vLLM has them; its first block is nobody's."""
    found = {k: v for k, v in fault.when.arguments.items() if k not in VARIED}
    if "num_blocks" in found:
        found |= {"num_gpu_blocks_override": found.pop("num_blocks") + 1, "max_model_len": 96}
    return found


def shown(answer: Answer, point: str) -> set[str]:
    """A promised point, and the nearest module around it that vLLM shows."""
    seen, around = {f.point for f in answer.findings}, point
    while around and around not in seen and not around.startswith("#"):
        around = around.rpartition(".")[0]
    return {point, around}
