"""The ranks that share a model, as layers see them: who am I, sum, join."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

c10d: Any = torch.distributed  # its stubs leave out much of what it has
LOOPBACK = "127.0.0.1"
"""Ranks are processes of one machine: nothing of them is to be seen from outside, whatever the host's name is."""


class Group(Protocol):
    """``size`` ranks that compute the same step together."""

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``tensor``."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's ``tensor`` side by side along the last axis, in order of rank."""
        ...


class Alone:
    """One rank: nothing to share, and torch.distributed is not touched.

    ``Alone(rank=1, size=2)`` is for building one rank's part of a model by itself: it cannot communicate.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself."""
        return self._only(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself."""
        return self._only(tensor)

    def _only(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            raise RuntimeError(f"rank {self.rank} of {self.size} was built alone and can only hold weights")
        return tensor


class Gloo:
    """Ranks in processes of one machine, over gloo. A process group of its own: torch's global one stays untouched.

    A rank that dies ends the others' wait with an error at once, one that hangs after ``timeout`` seconds.
    """

    def __init__(self, rank: int, size: int, *, store: Path, timeout: float) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None

    def connect(self) -> None:
        """Meet the other ranks. Raises RuntimeError if they do not come in time."""
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = self._timeout
        store = c10d.FileStore(str(self._store), self.size)
        store.set_timeout(self._timeout)
        self._group = c10d.ProcessGroupGloo(store, self.rank, self.size, options)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Group.all_reduce``."""
        shared = tensor.to("cpu", copy=True).contiguous()
        self._group.allreduce([shared]).wait()
        return shared.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Group.all_gather``."""
        own = tensor.to("cpu").contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._group.allgather([parts], [own]).wait()
        return torch.cat(parts, dim=-1).to(tensor.device)
