"""What the ledger looks at: where weights landed on every rank, and what was to be expected. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property

import msgspec

from paritykit.mapping.rules import Part
from paritykit.provenance.weightmap import (
    Arrived,
    Gap,
    Landing,
    ParameterInfo,
    RankLedger,
    Span,
    WeightMap,
    merge_ranks,
)


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """A problem that is meant to be: names that match the pattern ``name`` in full, and why."""

    problem: str
    name: str
    reason: str


class ReferenceLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What the reference makes of a checkpoint.

    ``parameters``: tensor to the parameter it fills, for those it uses. ``features``: tensor to its axis of output
    features. ``lookups``: tensors of embeddings, which are not multiplied. ``derived``: tensor to the functions
    that the reference takes of it. ``tied``: whether the output head shares the
    input embedding; ``embedding`` and ``head`` are those tensors.
    """

    parameters: dict[str, str] = {}
    features: dict[str, int] = {}
    lookups: list[str] = []
    derived: dict[str, list[str]] = {}
    tied: bool = False
    embedding: str = ""
    head: str = ""


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What the weights should look like.

    ``tensors``: checkpoint name to shape and dtype, from the files. ``declared``: tensor to parameter and part of it,
    as the engine's rules say. ``fused``: module to its parts. ``dtype`` is what the engine was asked to compute in.
    """

    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    reference: ReferenceLayout | None = None
    declared: dict[str, tuple[str, int | None]] = {}
    fused: dict[str, list[Part]] = {}
    dtype: str = ""
    allowed: list[Allowed] = []


class WeightSubject:
    """The ledgers of all ranks, indexed, with what was expected."""

    def __init__(self, ledgers: list[RankLedger], expected: Expected) -> None:
        self.ledgers = sorted(ledgers, key=lambda x: x.rank)
        self.expected = expected
        self.ranks = len(ledgers)

    @cached_property
    def stages(self) -> list[list[int]]:
        """The ranks of every stage of the pipeline: those share layers, others do not."""
        found: dict[int, list[int]] = defaultdict(list)
        for ledger in self.ledgers:
            found[ledger.stage].append(ledger.rank)
        return [found[stage] for stage in sorted(found)]

    @cached_property
    def shards(self) -> dict[int, int]:
        """Every rank's number within its stage."""
        return {rank: number for ranks in self.stages for number, rank in enumerate(ranks)}

    @cached_property
    def found(self) -> WeightMap:
        """One map over all ranks."""
        return merge_ranks(x.found for x in self.ledgers)

    @cached_property
    def by_tensor(self) -> dict[str, list[Landing]]:
        """Landings of each tensor, in order of rank."""
        found: dict[str, list[Landing]] = defaultdict(list)
        for landing in self.found.landings:
            found[landing.tensor].append(landing)
        return found

    @cached_property
    def by_parameter(self) -> dict[tuple[str, int], list[Landing]]:
        """Landings of each parameter of each rank, in order of its places."""
        found: dict[tuple[str, int], list[Landing]] = defaultdict(list)
        for landing in self.found.landings:
            found[landing.parameter, landing.rank].append(landing)
        for landings in found.values():
            landings.sort(key=lambda x: tuple(s.low for s in x.target))
        return found

    @cached_property
    def parameters(self) -> dict[tuple[str, int], ParameterInfo]:
        """Every parameter by name and rank."""
        return {(p.name, p.rank): p for p in self.found.parameters}

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """Parameter to the other names it has."""
        found: dict[str, list[str]] = defaultdict(list)
        for p in self.found.parameters:
            if p.same_as and p.name not in found[p.same_as]:
                found[p.same_as].append(p.name)
        return found

    def names_of(self, parameter: str) -> list[str]:
        """A parameter's name, then the other names of the same memory."""
        return list(dict.fromkeys([parameter, *self._alike.get(parameter, [])]))

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        """Every name of a parameter that has several, to all of them."""
        groups = ([first, *others] for first, others in self.aliases.items())
        return {name: group for group in groups for name in group}

    @property
    def gaps(self) -> list[Gap]:
        """What no tensor explains."""
        return self.found.gaps

    @cached_property
    def unfollowed(self) -> dict[str, str]:
        """Tensors of which it is not known where they arrived, to the parameter that they may be in.

        A parameter that was written unseen may hold any tensor that landed nowhere.
        """
        gaps = [g for g in self.gaps if g.kind == "unfollowed"]
        found = {g.tensor: g.parameter for g in gaps if g.tensor}
        unseen = next((g.parameter for g in gaps if not g.tensor), "")
        astray = [n for n in self.expected.tensors if unseen and n not in self.by_tensor]
        return dict.fromkeys(astray, unseen) | found

    @property
    def arrived(self) -> list[Arrived]:
        """Landings whose numbers were compared."""
        return [a for x in self.ledgers for a in x.arrived]

    @property
    def errors(self) -> dict[int, str]:
        """Ranks whose loader could not be traced, and why."""
        return {x.rank: x.error for x in self.ledgers if x.error}

    def shape(self, tensor: str) -> tuple[int, ...]:
        """A tensor's shape, as the loader was handed it."""
        found = self.found.tensors.get(tensor)
        return found.shape if found else self.expected.tensors[tensor][0]

    def part_of(self, landing: Landing) -> int | None:
        """The part of a fused parameter that a landing lies in; None where it is not fused or spans several parts."""
        parts = self.parts(landing.parameter)
        along = self._along(landing, sum(p.local for p in parts)) if parts and landing.target else Span(0, 0)
        start = 0
        for number, part in enumerate(parts):
            stop = start + part.local
            if start <= along.low and max(along.start, along.last) < stop:
                return number
            start = stop
        return None

    def _along(self, landing: Landing, total: int) -> Span:
        """Where a landing lies along the parameter's axis of ``total`` places, or that of the output features."""
        shape = self.parameters[landing.parameter, landing.rank].shape
        fits = [k for k, n in enumerate(shape) if n == total]
        if len(fits) == 1:
            return landing.target[fits[0]]
        axis = self.expected.reference.features.get(landing.tensor, 0) if self.expected.reference else 0
        return landing.target[landing.axes.index(axis) if axis in landing.axes else 0]

    def parts(self, parameter: str) -> list[Part]:
        """The parts of a fused parameter, in order along its axis of that size; empty where it has none."""
        modules = (name.rpartition(".")[0] for name in self.names_of(parameter))
        return next((self.expected.fused[m] for m in modules if m in self.expected.fused), [])
