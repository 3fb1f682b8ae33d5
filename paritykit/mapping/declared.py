"""Which candidate module stands for a reference module: by its weights, by what the engine declares, by name.

The checkpoint is the common tongue: transformers says which of its modules takes a checkpoint tensor, and where that
tensor landed in the candidate says which of its modules is the same. Rules that the engine declares are held against
it, and win where the two disagree, which is told. Containers follow their descendants; modules without weights follow
their parents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from paritykit.captures.manifest import Manifest, module_ranks
from paritykit.mapping.landed import SOURCE, Home, find_homes, landings_of, merge_blocks
from paritykit.mapping.rules import NEAREST, PARENT, PARTS, Block, Part, fused_blocks

SHARDS = {"q": 0, "k": 1, "v": 2}
EXPLICIT = ("declared loading rules", "packed_modules_mapping")
"""Sources that are somebody's statement, and not a guess from equal names."""


class Place(NamedTuple):
    """A candidate module, the fused part of it that is meant (None: all of it), and who said so.

    ``blocks`` are its output columns where its weights say so.
    """

    module: str
    part: int | None
    source: str
    blocks: tuple[Block, ...] | None = None


class Disagreement(NamedTuple):
    """A declared rule, and where the weights of that module really are."""

    reference: str
    declared: str
    landed: str


class ModuleMap:
    """Reference module path to candidate place, for every reference module that has one."""

    def __init__(self, reference: Manifest, candidate: Manifest) -> None:
        self._recorded = {p.module for p in candidate.points}
        self._modules = self._recorded | {*candidate.facts.get("modules", ()), *candidate.facts.get("same", ())}
        self._reference = list(dict.fromkeys(p.module for p in reference.points))
        self._packed: Mapping[str, list[str]] = candidate.facts.get("packed", {})
        self.fused = {m: [Part(**p) for p in parts] for m, parts in candidate.facts.get("fused", {}).items()}
        self._places: dict[str, Place] = {}
        self.weighted = self._weighted(candidate.facts.get("names", {}))
        self.disagreements: list[Disagreement] = []
        self._ranks = module_ranks(candidate.points)
        self._from_names(reference.facts.get("parameters", {}), candidate.facts.get("names", {}))
        self._from_weights(reference.facts, candidate.facts)
        head, other = reference.facts.get("head"), candidate.facts.get("head")
        if head and other:
            self._places[head] = Place(other, None, "output head")
        for module in self._reference:
            place = None if module in self._places else self._derive(module)
            if place is not None:
                self._places[module] = place

    @property
    def partners(self) -> dict[str, str]:
        """Candidate module path to reference module path, where one stands for the other."""
        return {place.module: module for module, place in self._places.items()}

    def __getitem__(self, module: str) -> Place | None:
        return self._places.get(module)

    def _weighted(self, names: Mapping[str, Any]) -> set[str]:
        """Candidate modules that hold weights of the checkpoint; all of them where the engine does not say."""
        targets = [t[0] for t in names.values() if t is not None]
        return {m for t in targets if (m := longest_prefix(t, self._modules))} or self._modules

    def _from_names(self, parameters: Mapping[str, str], names: Mapping[str, Any]) -> None:
        """Where both sides put each checkpoint tensor; a module whose tensors go to several parts takes all of it."""
        known = set(self._reference)
        for tensor, parameter in parameters.items():
            target = names.get(tensor, (tensor, "")) if names else None
            module = parameter.rpartition(".")[0]
            if target is None or module not in known:
                continue
            place = self._place(*target)
            if place is not None:
                held = self._places.get(module)
                same = held is None or held.part == place.part
                self._places[module] = place if same else place._replace(part=None)

    def _from_weights(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        """Where the weights landed, over what is only a guess from names; beside what is declared."""
        landings = landings_of(theirs)
        known = set(self._reference)
        parameters = ours.get("parameters", {})
        homes = find_homes(
            landings,
            parameters=parameters,
            features=ours.get("features", {}),
            owner={p: m for p in parameters.values() if (m := p.rpartition(".")[0]) in known},
            home={p: m for x in landings if (m := (p := x.parameter).rpartition(".")[0])},
        )
        for module, found in homes.items():
            home = self._recorded_home(module, found, homes)
            if home is None:
                continue
            held = self._places.get(module)
            if held is not None and held.source in EXPLICIT and not self._agree(held, home):
                declared = told(held.module, self._declared_blocks(held))
                self.disagreements.append(Disagreement(module, declared, told(home.module, home.blocks)))
            else:
                part = held.part if held is not None and held.module == home.module else None
                self._places[module] = Place(home.module, part, SOURCE, home.blocks)

    def _recorded_home(self, module: str, home: Home, homes: Mapping[str, Home]) -> Home | None:
        """The home itself where its output was recorded, else the nearest module around it that holds nothing else."""
        if home.module in self._recorded:
            return home
        around = longest_prefix(home.module, self._recorded)
        others = (m for m, h in homes.items() if around and f"{h.module}.".startswith(f"{around}."))
        alone = all(f"{m}.".startswith(f"{module}.") for m in others)
        return Home(around, None) if around and alone else None

    def _agree(self, place: Place, home: Home) -> bool:
        declared = self._declared_blocks(place)
        same = home.blocks is None or declared is None or home.blocks == declared
        return place.module == home.module and same

    def _declared_blocks(self, place: Place) -> tuple[Block, ...] | None:
        parts = self.fused.get(place.module)
        if not parts or (place.part is not None and place.part >= len(parts)):
            return None
        return merge_blocks(fused_blocks(parts, ranks=self._ranks.get(place.module, [0]), wanted=place.part))

    def _place(self, parameter: str, shard: str) -> Place | None:
        path = parameter.rpartition(".")[0]
        module = longest_prefix(parameter, self._modules)
        if module == path and shard:
            part = part_number(shard)
            return None if part is None else Place(path, part, "declared loading rules")
        parent, _, last = path.rpartition(".")
        for packed, parts in self._packed.items():
            fused = f"{parent}.{packed}" if parent else packed
            if last in parts and len(parts) > 1 and fused in self._modules and path not in self._modules:
                return Place(fused, parts.index(last), "packed_modules_mapping")
        return None if module is None else Place(module, None, "equal name" if module == path else NEAREST)

    def _derive(self, module: str) -> Place | None:
        """A container's place from its mapped descendants; otherwise the same name under its parent's place."""
        if not module:
            return Place("", None, "whole model")
        votes: Counter[str] = Counter()
        for inner, place in self._places.items():
            if inner.startswith(module + "."):
                depth = inner[len(module) :].count(".")
                votes[ancestor(place.module, depth)] += 1
        best = next((m for m, _ in votes.most_common() if m in self._modules), None)
        if best is not None:
            return Place(best, None, "equal name" if best == module else PARTS)
        parent, _, last = module.rpartition(".")
        above = self._places.get(parent) if parent else Place("", None, "")
        path = f"{above.module}.{last}".lstrip(".") if above else module
        found = next((p for p in (path, module) if p in self._modules), None)
        return None if found is None else Place(found, None, "equal name" if found == module else PARENT)


def part_number(shard: str) -> int | None:
    """The number of a fused part that a shard id means; None for none, or one that is no number.

    >>> part_number("k"), part_number("1"), part_number("")
    (1, 1, None)
    """
    return SHARDS.get(shard, int(shard) if shard.isdecimal() else None)


def told(module: str, blocks: tuple[Block, ...] | None) -> str:
    """A place in words.

    >>> told("qkv_proj", (Block(0, 0, 8),))
    'qkv_proj columns 0:8'
    """
    columns = [f"{f'rank {b.rank} ' if b.rank else ''}columns {b.start}:{b.start + b.length}" for b in blocks or ()]
    return " ".join([module, ", ".join(columns)]).strip()


def longest_prefix(path: str, known: set[str]) -> str | None:
    """The longest module path in ``known`` that ``path`` lies under."""
    while path:
        path = path.rpartition(".")[0]
        if path in known:
            return path or None
    return None


def ancestor(path: str, depth: int) -> str:
    """``path`` without its last ``depth`` components."""
    for _ in range(depth):
        path = path.rpartition(".")[0]
    return path
