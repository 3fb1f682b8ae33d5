"""Ranks end cleanly, and one that dies, hangs or fails never hangs the others."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from paritykit.engines.nano import team
from paritykit.engines.nano.core import NanoLLM
from paritykit.errors import EngineError
from paritykit.testing import tiny_model
from tests.nano import drive, one_thread

PROMPT = tuple(range(20))


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def two_ranks(**arguments: Any) -> NanoLLM:
    return NanoLLM(tiny_model("qwen2", num_hidden_layers=2), tensor_parallel_size=2, **arguments)


def children() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # ended, or a zombie that nobody waited for yet
            if any("nano.rank" in word for word in process.cmdline()):
                found.append(process)
    return found


def test_two_ranks_give_what_one_gives_and_leave_nothing() -> None:
    before = children()
    with two_ranks() as llm:
        assert len(children()) == len(before) + 1
        shared = drive(llm, [PROMPT], max_tokens=5)[0]
    assert len(children()) == len(before)
    with NanoLLM(tiny_model("qwen2", num_hidden_layers=2)) as llm:
        assert not torch.distributed.is_initialized()
        assert drive(llm, [PROMPT], max_tokens=5)[0].error(shared) < 1e-5


def test_two_engines_with_ranks_live_side_by_side() -> None:
    with two_ranks() as one, two_ranks(block_size=3) as other:
        assert drive(one, [PROMPT], max_tokens=3)[0].tokens == drive(other, [PROMPT], max_tokens=3)[0].tokens


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_rank_that_dies_is_reported_at_once(how: signal.Signals) -> None:
    with two_ranks() as llm:
        llm.add_request(PROMPT)
        llm.step()
        (rank,) = llm.team._others
        os.kill(rank.process.pid, how)
        started = time.monotonic()
        with pytest.raises(EngineError, match=f"rank 1 of nano died of signal {how.value}"):
            llm.generate([PROMPT])
        assert time.monotonic() - started < 50
        with pytest.raises(EngineError, match="ranks were stopped after an error"):
            llm.step()


def test_a_rank_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "GRACE", 0.3)
    with two_ranks(timeout=8.0) as llm:
        llm.add_request(PROMPT)
        llm.step()
        (rank,) = llm.team._others
        os.kill(rank.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineError, match="rank 1 of nano did not answer"):
            llm.step()
        assert time.monotonic() - started < 50


def test_a_rank_that_fails_says_why() -> None:
    with two_ranks(timeout=8.0) as llm:
        llm.team.call("call", "tests.integration.test_nano_ranks:fail_on_rank_1", {})
        llm.add_request(PROMPT)
        with pytest.raises(EngineError, match="rank 1 of nano failed: ValueError: planted"):
            llm.step()


def stages(count: int, **arguments: Any) -> NanoLLM:
    return NanoLLM(tiny_model("qwen2", num_hidden_layers=3), pipeline_parallel_size=count, **arguments)


def test_a_stage_that_dies_is_reported_at_once() -> None:
    before = len(children())
    with stages(3) as llm:
        llm.add_request(PROMPT)
        llm.step()
        os.kill(llm.team._others[0].process.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineError, match="rank 1 of nano died of signal 9"):
            llm.generate([PROMPT])
        assert time.monotonic() - started < 30
    assert len(children()) == before


def test_a_stage_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "GRACE", 0.3)
    with stages(2, timeout=3.0) as llm:
        llm.add_request(PROMPT)
        llm.step()
        (rank,) = llm.team._others
        os.kill(rank.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineError, match="rank 1 of nano did not answer"):
            llm.step()
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("rank", "chunk"), [(1, 64), (1, 5), (2, 5)], ids=["rank 0 waits for logits", "rank 2 waits for it", "nobody waits"]
)
def test_a_stage_that_fails_says_why_and_nobody_waits_for_it(rank: int, chunk: int) -> None:
    """Well before the timeout: the rank that failed hangs up."""
    with stages(3, max_num_batched_tokens=chunk, timeout=100.0) as llm:
        llm.team.call("call", f"tests.integration.test_nano_ranks:fail_on_stage_{rank}", {})
        llm.add_request(PROMPT)
        started = time.monotonic()
        with pytest.raises(EngineError, match=f"rank {rank} of nano failed: ValueError: planted"):
            llm.step()
        assert time.monotonic() - started < 30
        with pytest.raises(EngineError, match="ranks were stopped after an error"):
            llm.step()


@pytest.mark.deep
def test_the_rank_that_failed_is_named_and_not_those_that_waited_for_it() -> None:
    with NanoLLM(tiny_model("qwen2", num_hidden_layers=2), tensor_parallel_size=4, timeout=100.0) as llm:
        llm.team.call("call", "tests.integration.test_nano_ranks:fail_on_rank_2", {})
        llm.add_request(PROMPT)
        with pytest.raises(EngineError, match="rank 2 of nano failed: ValueError: planted"):
            llm.step()


@pytest.mark.deep
def test_a_rank_of_a_stage_of_two_that_dies_is_reported_at_once() -> None:
    with stages(2, tensor_parallel_size=2) as llm:
        llm.add_request(PROMPT)
        llm.step()
        os.kill(llm.team._others[2].process.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineError, match="rank 3 of nano died of signal 9"):
            llm.generate([PROMPT])
        assert time.monotonic() - started < 30


def test_rank_0_failing_frees_the_others() -> None:
    llm = two_ranks(timeout=8.0)
    (rank,) = llm.team._others
    fail_on(0, llm.team.worker)
    llm.add_request(PROMPT)
    with pytest.raises(ValueError, match="planted"):
        llm.step()
    assert rank.process.poll() is not None
    llm.close()


def test_a_missing_tensor_stops_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("qwen2", num_hidden_layers=2), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    before = len(children())
    for ranks in (1, 2):
        with pytest.raises(EngineError, match=r"lacks the tensor\(s\) model.norm.weight"):
            NanoLLM(folder, tensor_parallel_size=ranks)
    assert len(children()) == before


def test_ranks_end_with_their_host() -> None:
    script = (
        "import os, signal, sys; from paritykit.engines.nano.core import NanoLLM; "
        "llm = NanoLLM(sys.argv[1], tensor_parallel_size=2); "
        "print(llm.team._others[0].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    model = str(tiny_model("qwen2", num_hidden_layers=2))
    command = [sys.executable, "-c", script, model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    rank = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the rank outlived its host"
        time.sleep(0.05)


def fail(*_: Any) -> Any:
    raise ValueError("planted")


def fail_on(rank: int, worker: Any) -> None:
    if worker.group.rank == rank:
        worker.model.model.layers[1].mlp.forward = fail


def fail_on_rank_1(worker: Any) -> None:
    fail_on(1, worker)


def fail_on_rank_2(worker: Any) -> None:
    fail_on(2, worker)


def fail_on_stage_1(worker: Any) -> None:
    if worker.place.rank == 1:
        worker.model.model.layers[1].mlp.forward = fail


def fail_on_stage_2(worker: Any) -> None:
    if worker.place.rank == 2:
        worker.model.model.norm.forward = fail
