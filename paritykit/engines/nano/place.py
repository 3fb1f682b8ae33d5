"""Where a rank stands among all: its stage, the ranks beside it, and the way of hidden states through the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from paritykit.engines.nano.group import Alone, Group, Joined
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.stage import Stage


@dataclass(frozen=True)
class Place:
    """One rank's place: ``group`` are the ranks that share each layer of its ``stage``, ``world`` are all.

    Ranks are numbered stage by stage, as in vLLM: ``rank = stage * tensor_parallel_size + rank in the group``.
    """

    stage: Stage = field(default_factory=Stage)
    group: Group = field(default_factory=Alone)
    world: Group = field(default_factory=Alone)

    @classmethod
    def of(cls, rank: int, settings: Settings, *, store: Path) -> Place:
        """The place of ``rank`` in its own process; ``store`` is the file where the ranks meet."""

        def joined(rank: int, size: int, name: str) -> Joined:
            backend, timeout = settings.distributed_backend, settings.timeout
            return Joined(rank, size, name=name, store=store, backend=backend, timeout=timeout)

        size = settings.tensor_parallel_size
        stage = Stage(rank // size, settings.pipeline_parallel_size)
        world = joined(rank, settings.ranks, "world")
        if stage.count == 1:
            return cls(stage, world, world)
        return cls(stage, joined(rank % size, size, f"stage{stage.number}") if size > 1 else Alone(), world)

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return self.world.rank

    def connect(self) -> None:
        """Meet the other ranks. Raises LostRankError if they do not come in time."""
        for group in dict.fromkeys((self.world, self.group)):
            group.connect()

    def disconnect(self) -> None:
        """Hang up, so that ranks that wait for this one see it at once."""
        for group in (self.world, self.group):
            group.disconnect()

    def receive_hidden(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Hidden states of the stage before, ``[tokens, hidden]``; None on the first stage."""
        if self.stage.first:
            return None
        empty = torch.empty(shape, dtype=dtype, device=device)
        return self.world.receive(empty, source=self.rank - self.group.size)

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """Hidden states to the stage after; nothing on the last."""
        if not self.stage.last:
            self.world.send(hidden, to=self.rank + self.group.size)

    def bring_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The last stage's ``logits`` on rank 0, where tokens are chosen; elsewhere what was given.

        Where there are none to bring, nothing is sent.
        """
        source = (self.stage.count - 1) * self.group.size
        if source == 0 or not len(logits):
            return logits
        if self.rank == source:
            self.world.send(logits, to=0)
        return self.world.receive(logits, source=source) if self.rank == 0 else logits
