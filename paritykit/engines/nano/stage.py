"""Pipeline stages: which of the model's layers a rank has. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Stage:
    """The stage ``number`` of ``count``: a stretch of layers, on the first the embedding, on the last norm and head."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether token ids come in here."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether logits come out here."""
        return self.number == self.count - 1

    def layers(self, total: int) -> range:
        """The numbers of its layers, of ``total`` in the model."""
        return share_layers(total, self.count)[self.number]


def share_layers(total: int, stages: int) -> list[range]:
    """The layers of every stage, in order: each has as many, and what is left goes to stages before the last.

    The one before the last gets the first of them, as in vLLM: the last stage has the head to compute, too.

    >>> share_layers(5, 3)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    each, left = divmod(total, stages)
    ends = [0]
    for number in range(stages):
        extra = stages - 1 - left <= number < stages - 1
        ends.append(ends[-1] + each + extra)
    return [range(*pair) for pair in pairwise(ends)]
