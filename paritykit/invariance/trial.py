"""What is run: cases, as they are submitted, under a condition; and which two runs must agree. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from paritykit.case import Case

T = TypeVar("T")
Arguments = dict[str, Any]
"""Of an engine's constructor."""
MARK = "~"
"""Between the id of a case and what tells its repetitions apart."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``arguments`` of the engine's constructor differ from the user's own; ``cases`` as submitted.

    ``name`` says in words how this run differs. ``points`` are glob patterns of what is recorded, None for all;
    ``poison`` fills the whole KV cache with a number first.
    """

    name: str
    cases: tuple[Case, ...]
    arguments: Arguments = {}
    points: tuple[str, ...] | None = None
    poison: float | None = None


class Twins(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs that must agree. ``pairs`` are (case of the base, case of the varied run) that stand for each other.

    ``partial``: the varied run may leave out positions that it did not have to compute. ``exact``: bit for bit.
    ``ranks``: the ranks of the varied run must agree among themselves, and have the weights of the base.
    """

    base: Trial
    varied: Trial
    pairs: tuple[tuple[str, str], ...]
    partial: bool = False
    exact: bool = False
    ranks: bool = False


class Bench(Protocol):
    """What a property may know of the engine and the model."""

    cases: list[Case]

    @property
    def capabilities(self) -> frozenset[str]:
        """What the engine can do."""
        ...

    @property
    def args(self) -> Mapping[str, str]:
        """How the engine runs."""
        ...

    @property
    def parallel(self) -> Mapping[str, int]:
        """Its parallel sizes."""
        ...

    @property
    def engine(self) -> str:
        """Its name."""
        ...

    def variations(self, kind: str) -> list[Arguments]:
        """Other arguments under which the engine must give the same, by kind: as the engine declares them."""
        ...

    def pick(self, options: Sequence[T], *, few: int = 1) -> list[T]:
        """All of some ways to run, most telling first; only so ``few`` of them where the bench is to be quick."""
        ...

    def continuation(self, trial: Trial) -> dict[str, list[int]]:
        """The tokens after each case of ``trial``, as fed to it or chosen, by case id; runs it on first need."""
        ...


class Skipped(msgspec.Struct, frozen=True):
    """A condition that cannot be tried here, and why."""

    condition: str
    reason: str


Property = Callable[[Bench], Iterable["Twins | Skipped"]]
"""The runs that must agree, for a bench's engine and cases."""


def alone(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Each case in a batch of its own."""
    return tuple(msgspec.structs.replace(c, batch=n) for n, c in enumerate(cases))


def together(cases: Iterable[Case]) -> tuple[Case, ...]:
    """All cases in one batch."""
    return tuple(msgspec.structs.replace(c, batch=0) for c in cases)


def again(case: Case, number: int | str) -> Case:
    """The same case under another id."""
    return msgspec.structs.replace(case, id=f"{case.id}{MARK}{number}")


def same(cases: Iterable[Case]) -> tuple[tuple[str, str], ...]:
    """Every case stands for itself."""
    return tuple((c.id, c.id) for c in cases)


def fed(cases: Iterable[Case], continuation: Mapping[str, list[int]]) -> tuple[Case, ...]:
    """The cases, each fed what was chosen after it, so that every run computes the same positions."""
    return tuple(c.force(continuation[c.id]) if c.new_tokens else c for c in cases)
