"""Ranks that talk over real gloo, each a thread with process groups of its own; and which backend is chosen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.engines.nano.group import Alone, Joined, LostRankError, choose_backend, rank_device
from paritykit.engines.nano.place import Place
from paritykit.engines.nano.settings import Settings
from paritykit.errors import UsageError


def among(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives for each rank, or the error it ends with."""
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(t.is_alive() for t in threads)
    return results


def joined(rank: int, size: int, folder: Path, *, timeout: float = 20.0, name: str = "world") -> Joined:
    group = Joined(rank, size, name=name, store=folder / "store", backend="gloo", timeout=timeout)
    group.connect()
    return group


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_tensor_passed_round_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    given = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)

    def work(rank: int) -> torch.Tensor:
        group = joined(rank, 3, tmp_path)
        found = given.t() if rank == 0 else group.receive(torch.empty(7, 5, dtype=dtype), source=rank - 1)
        group.send(found, to=(rank + 1) % 3)
        return group.receive(torch.empty(7, 5, dtype=dtype), source=2) if rank == 0 else found

    assert all(torch.equal(found, given.t()) for found in among(3, work))


def test_places_of_two_stages_of_two_ranks(tmp_path: Path) -> None:
    """Sums stay within a stage; hidden states go to the same place of the next; logits come back to rank 0."""
    settings = Settings(
        model="", tensor_parallel_size=2, pipeline_parallel_size=2, distributed_backend="gloo", timeout=10.0
    )

    def work(rank: int) -> Any:
        place = Place.of(rank, settings, store=tmp_path / "store")
        place.connect()
        total = place.group.all_reduce(torch.full((3,), float(rank)))
        given = place.receive_hidden(2, 3, dtype=torch.float32, device=torch.device("cpu"))
        place.send_hidden(torch.full((2, 3), 10.0 + rank))
        logits = place.bring_logits(torch.full((1, 4), 20.0 + rank))
        if rank == 0:
            assert len(place.bring_logits(torch.empty(0, 4))) == 0, "nobody else says anything"
        where = place.rank, place.stage.number, place.group.rank, place.stage.first, place.stage.last
        return where, total.tolist(), None if given is None else given.tolist(), logits.tolist()

    places, totals, hidden, logits = zip(*among(4, work), strict=True)
    assert places == (
        (0, 0, 0, True, False), (1, 0, 1, True, False), (2, 1, 0, False, True), (3, 1, 1, False, True),
    )  # fmt: skip
    assert totals == ([1.0] * 3, [1.0] * 3, [5.0] * 3, [5.0] * 3)
    assert hidden == (None, None, [[10.0] * 3] * 2, [[11.0] * 3] * 2)
    assert logits == ([[22.0] * 4], [[21.0] * 4], [[22.0] * 4], [[23.0] * 4])


def test_one_stage_has_one_group(tmp_path: Path) -> None:
    settings = Settings(model="", tensor_parallel_size=2, distributed_backend="gloo")
    place = Place.of(1, settings, store=tmp_path / "store")
    assert place.world is place.group
    assert (place.rank, place.group.size, place.stage.count) == (1, 2, 1)


def test_a_rank_that_hangs_up_ends_the_wait_of_others_at_once(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        group = joined(rank, 2, tmp_path)
        started = time.monotonic()
        if rank == 1:
            group.disconnect()
            return None
        with pytest.raises(LostRankError):
            group.receive(torch.empty(3), source=1)
        return time.monotonic() - started

    assert among(2, work)[0] < 5


@pytest.mark.parametrize("what", ["receive", "all_reduce", "all_gather", "connect"])
def test_a_rank_that_does_nothing_is_given_up_after_the_timeout(what: str, tmp_path: Path) -> None:
    done = threading.Event()

    def work(rank: int) -> Any:
        if what == "connect" and rank == 1:
            return None
        started = time.monotonic()
        try:
            group = joined(rank, 2, tmp_path, timeout=1.0)
            if rank == 1:
                done.wait(20)
                return None
            more = {"source": 1} if what == "receive" else {}
            getattr(group, what)(torch.empty(3), **more)
        finally:
            if rank == 0:
                done.set()
                assert 0.5 < time.monotonic() - started < 15

    assert isinstance(among(2, work)[0], LostRankError)


def test_a_rank_alone() -> None:
    x = torch.ones(2)
    assert Alone().all_reduce(x) is Alone().all_gather(x) is x
    for act in (lambda g: g.send(x, to=1), lambda g: g.receive(x, source=1)):
        with pytest.raises(RuntimeError, match="a rank that is alone cannot"):
            act(Alone())
    with pytest.raises(RuntimeError, match="can only hold weights"):
        Alone(1, 2).all_reduce(x)
    place = Place()
    place.connect()
    place.send_hidden(x)
    assert place.receive_hidden(2, dtype=x.dtype, device=x.device) is None
    assert place.bring_logits(x) is x


@pytest.mark.parametrize(("name", "device", "ranks", "gpus", "chosen"), [
    ("auto", "cpu", 1, 0, ""), ("auto", "cuda", 1, 8, ""), ("auto", "cpu", 4, 8, "gloo"),
    ("auto", "cuda", 4, 2, "gloo"), ("auto", "cuda:0", 2, 2, "gloo"), ("gloo", "cuda", 2, 8, "gloo"),
    ("nccl", "cuda", 2, 2, "nccl"), ("nccl", "cuda:1", 1, 2, "nccl"),
])  # fmt: skip
def test_the_backend(name: str, device: str, ranks: int, gpus: int, chosen: str) -> None:
    assert choose_backend(name, device=device, ranks=ranks, gpus=gpus) == chosen


def test_ranks_with_a_gpu_each_use_nccl_where_torch_has_it() -> None:
    wanted = "nccl" if torch.distributed.is_nccl_available() else "gloo"
    assert choose_backend("auto", device="cuda", ranks=2, gpus=2) == wanted


@pytest.mark.parametrize(("device", "ranks", "gpus", "message"), [
    ("cpu", 2, 8, "needs device='cuda', not 'cpu'"),
    ("cuda", 1, 0, "needs CUDA GPUs, and torch sees none here"),
    ("cuda", 4, 2, "needs a GPU for each of 4 ranks, and there are 2"),
    ("cuda:1", 2, 4, "needs a GPU for each of 2 ranks, and device is 'cuda:1'"),
])  # fmt: skip
def test_where_nccl_is_refused(device: str, ranks: int, gpus: int, message: str) -> None:
    with pytest.raises(UsageError, match=f"distributed_backend 'nccl' {message}"):
        choose_backend("nccl", device=device, ranks=ranks, gpus=gpus)


@pytest.mark.parametrize(("device", "rank", "gpus", "found"), [
    ("cpu", 3, 8, "cpu"), ("cuda", 0, 2, "cuda:0"), ("cuda", 3, 2, "cuda:1"), ("cuda:1", 0, 2, "cuda:1"),
    ("cuda", 3, 0, "cuda"),
])  # fmt: skip
def test_the_device_of_a_rank(device: str, rank: int, gpus: int, found: str) -> None:
    assert rank_device(device, rank=rank, gpus=gpus) == torch.device(found)
