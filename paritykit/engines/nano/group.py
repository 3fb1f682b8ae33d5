"""The ranks that share a model, as layers see them: who am I, sum, join, send, receive."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

from paritykit.errors import UsageError

c10d: Any = torch.distributed  # its stubs leave out much of what it has
LOOPBACK = "127.0.0.1"
"""Ranks are processes of one machine: nothing of them is to be seen from outside, whatever the host's name is."""
PATIENT = 10
"""NCCL's own watchdog ends the process: it is given this many times the time after which a wait is an error here."""


class LostRankError(RuntimeError):
    """Another rank did not do its part: it failed, died or hangs."""


class Group(Protocol):
    """``size`` ranks that compute the same step together."""

    rank: int
    size: int

    def connect(self) -> None:
        """Meet the other ranks. Raises LostRankError if they do not come in time."""
        ...

    def disconnect(self) -> None:
        """Hang up, so that ranks that wait for this one see it at once."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``tensor``."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's ``tensor`` side by side along the last axis, in order of rank."""
        ...

    def send(self, tensor: torch.Tensor, *, to: int) -> None:
        """Hand ``tensor`` to another rank, which must call ``receive``."""
        ...

    def receive(self, empty: torch.Tensor, *, source: int) -> torch.Tensor:
        """What rank ``source`` sends: of the shape, dtype and device of ``empty``."""
        ...


class Alone:
    """One rank: nothing to share, and torch.distributed is not touched.

    ``Alone(rank=1, size=2)`` is for building one rank's part of a model by itself: it cannot communicate.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def connect(self) -> None:
        """There is nobody to meet."""

    def disconnect(self) -> None:
        """There is nobody to leave."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself."""
        return self._only(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself."""
        return self._only(tensor)

    def send(self, tensor: torch.Tensor, *, to: int) -> None:
        """Raises RuntimeError."""
        del tensor
        raise RuntimeError(f"a rank that is alone cannot send to rank {to}")

    def receive(self, empty: torch.Tensor, *, source: int) -> torch.Tensor:
        """Raises RuntimeError."""
        del empty
        raise RuntimeError(f"a rank that is alone cannot receive from rank {source}")

    def _only(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            raise RuntimeError(f"rank {self.rank} of {self.size} was built alone and can only hold weights")
        return tensor


class Joined:
    """Ranks in processes of one machine, over gloo or NCCL.

    A process group of its own, called ``name`` in the ``store`` where the ranks meet: torch's global one stays
    untouched. Over gloo a rank that dies or hangs up ends the others' wait with LostRankError at once; one that hangs,
    and any trouble over NCCL, after ``timeout`` seconds.
    """

    def __init__(self, rank: int, size: int, *, name: str, store: Path, backend: str, timeout: float) -> None:
        self.rank, self.size = rank, size
        self._name, self._store, self._timeout = name, store, timeout
        self._nccl = backend == "nccl"
        self._group: Any = None

    def connect(self) -> None:
        """See ``Group.connect``."""
        try:
            store = c10d.FileStore(str(self._store), -1)
            store.set_timeout(timedelta(seconds=self._timeout))
            make = _make_nccl if self._nccl else _make_gloo
            self._group = make(c10d.PrefixStore(self._name, store), self.rank, self.size, self._timeout)
        except RuntimeError as error:
            raise LostRankError(str(error)) from error

    def disconnect(self) -> None:
        """See ``Group.disconnect``."""
        group, self._group = self._group, None
        if group is not None and self._nccl:
            group.abort()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Group.all_reduce``."""
        shared = self._own(tensor, copy=True)
        self._finish(lambda group: group.allreduce([shared]))
        return shared.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Group.all_gather``."""
        own = self._own(tensor)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._finish(lambda group: group.allgather([parts], [own]))
        return torch.cat(parts, dim=-1).to(tensor.device)

    def send(self, tensor: torch.Tensor, *, to: int) -> None:
        """See ``Group.send``."""
        own = self._own(tensor)
        self._finish(lambda group: group.send([own], to, 0))

    def receive(self, empty: torch.Tensor, *, source: int) -> torch.Tensor:
        """See ``Group.receive``."""
        own = torch.empty(empty.shape, dtype=empty.dtype, device=empty.device if self._nccl else "cpu")
        self._finish(lambda group: group.recv([own], source, 0))
        return own.to(empty.device)

    def _own(self, tensor: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
        """``tensor`` where the backend can read it: gloo wants it on the CPU, NCCL where it is."""
        return tensor.to(tensor.device if self._nccl else "cpu", copy=copy).contiguous()

    def _finish(self, begin: Callable[[Any], Any]) -> None:
        """Begin an operation and wait for its end. Raises LostRankError."""
        try:
            work = begin(self._group)
            work.wait()  # over NCCL this only puts it in order with what is computed
            deadline = time.monotonic() + self._timeout
            while self._nccl and not work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no answer from the other ranks within {self._timeout:g} seconds")
        except RuntimeError as error:
            raise LostRankError(str(error)) from error


def choose_backend(name: str, *, device: str, ranks: int, gpus: int) -> str:
    """How ``ranks`` ranks talk on a machine with ``gpus`` GPUs: ``gloo``, ``nccl``, or nothing for one rank.

    ``auto`` is NCCL where every rank has a GPU of its own; it refuses two ranks on one. Raises UsageError.
    """
    if name == "nccl":
        refusal = _why_no_nccl(device, ranks, gpus)
        if refusal:
            raise UsageError(f"distributed_backend 'nccl' {refusal}")
    if name != "auto":
        return name
    if ranks == 1:
        return ""
    return "gloo" if _why_no_nccl(device, ranks, gpus) or not c10d.is_nccl_available() else "nccl"


def _why_no_nccl(device: str, ranks: int, gpus: int) -> str:
    if not device.startswith("cuda"):
        return f"needs device='cuda', not {device!r}: use gloo there"
    if not gpus:
        return "needs CUDA GPUs, and torch sees none here"
    if ranks > 1 and device != "cuda":
        return f"needs a GPU for each of {ranks} ranks, and device is {device!r}: give device='cuda', or use gloo"
    if ranks > gpus:
        return f"needs a GPU for each of {ranks} ranks, and there are {gpus}: ranks that share one use gloo"
    return ""


def rank_device(device: str, *, rank: int, gpus: int) -> torch.device:
    """The device of a rank: ``cuda`` deals the GPUs out in turn, anything else is meant as it is."""
    return torch.device(f"cuda:{rank % gpus}" if device == "cuda" and gpus else device)


def _make_gloo(store: Any, rank: int, size: int, timeout: float) -> Any:
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=timeout)
    return c10d.ProcessGroupGloo(store, rank, size, options)


def _make_nccl(store: Any, rank: int, size: int, timeout: float) -> Any:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout * PATIENT)
    return c10d.ProcessGroupNCCL(store, rank, size, options)
