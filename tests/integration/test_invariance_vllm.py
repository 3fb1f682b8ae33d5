"""Real vLLM against itself: quiet as it is, and each fault found under the condition it needs, where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from paritykit.runner import Session
from paritykit.testing import tiny_model
from paritykit.testing.faults import FAULTS, Fault, find
from tests.faulty import VOCABULARY, homes, model_of
from tests.nano import one_thread

pytestmark = [pytest.mark.deep, pytest.mark.xdist_group("vllm-invariance")]
CASES = ("len-36+3@b", "len-5+3", "len-1+2")
LONG = ("len-70+6", *CASES)
"""For conditions with blocks of 32."""
RANKED = ("tensor_parallel", "pipeline_parallel")
VARIED = {"tensor_parallel_size", "pipeline_parallel_size", "enable_prefix_caching", "max_num_batched_tokens"}
"""Arguments of a fault's conditions that its check varies itself."""
NULL = ("null-forward", "null-parameter", "null-rotation", "null-attention", "null-loading")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


class Hosts:
    """Processes that hold one engine after the other: the user's own, and those that are varied, by their ranks."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], HostProcess] = {}

    def engine(self, role: str, model: Path, arguments: dict[str, Any]) -> ProcessEngine:
        ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
        host = self._found.setdefault((role, ranks), HostProcess())
        return ProcessEngine("vllm", str(model), {"dtype": "float32", "provenance": False, **arguments}, host=host)

    def stop(self) -> None:
        for host in self._found.values():
            host.stop()


@pytest.fixture(scope="module")
def processes(importable: None) -> Iterator[Hosts]:
    found = Hosts()
    yield found
    found.stop()


@pytest.fixture
def session(processes: Hosts) -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def make(model: Path, *, cases: list[pk.Case] | None = None, **own: Any) -> Session:
        found = Checkpoint.find(str(model))
        made = Session(
            reference=HFEngine(str(model)),
            candidate=processes.engine("own", model, own),
            cases=cases or pk.cases(*CASES).resolve(vocab_size=found.vocab_size),
            checkpoint=found,
            vary=lambda more: processes.engine("varied", model, {**own, **more}),
        )
        opened.append(made)
        return made

    yield make
    for each in opened:
        each.close()


def long_cases() -> list[pk.Case]:
    return pk.cases(*LONG).resolve(vocab_size=VOCABULARY)


def vary(session: Session, name: str) -> Answer:
    check = CHECKS.get(name)
    assert isinstance(check, InvarianceCheck)
    return session.vary(check)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_quiet_as_it_is(session: Callable[..., Session], family: str) -> None:
    ran = session(tiny_model(family, num_hidden_layers=2), cases=long_cases(), block_size=32)
    for name in INVARIANCES:
        answer = vary(ran, name)
        assert [f for f in answer.findings if f.verdict != "pass"] == [], name
        assert {f.case for f in answer.findings} == set(LONG), name
        assert not answer.coverage.skipped, name
        assert answer.coverage.compared > 1, name


@pytest.mark.parametrize("fault", NULL)
def test_quiet_where_nothing_is_planted(session: Callable[..., Session], fault: str) -> None:
    ran = session(model_of("qwen2"), **find(fault).arguments(layer=1))
    for name in ("batching", "decode_prefill"):
        answer = vary(ran, name)
        assert answer.findings
        assert [f for f in answer.findings if f.verdict != "pass"] == [], name


def planted(check: str) -> Iterator[Any]:
    for name, fault in FAULTS.items():
        if check in fault.checks and "vllm" in fault.engines and fault.stage != "checkpoint":
            yield pytest.param(check, name, id=f"{check}-{name}")


@pytest.mark.parametrize(("check", "name"), [p for c in INVARIANCES for p in planted(c)])
def test_a_fault_is_found_under_its_condition(session: Callable[..., Session], check: str, name: str) -> None:
    fault: Fault = FAULTS.get(name)
    home, layer = next(iter(homes(fault).items()))
    conditions = conditions_of(fault)
    cases = long_cases() if "block_size" in conditions else None
    if "num_gpu_blocks_override" in conditions:
        cases = fault.when.cases(vocab_size=VOCABULARY)
    answer = vary(session(model_of(home), cases=cases, **conditions, **fault.arguments(layer=layer)), check)
    first = first_divergence(answer.findings)
    assert first is not None, f"{check} does not see {name}"
    assert first.origin != "inherited"
    places = {place.partition("#")[0] for place in (first.point, first.seen_at)}
    assert places & shown(answer, fault.at(layer=layer)), first


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
