"""The mapping of two captures: a rule for every reference point that has a counterpart, a reason for the others."""

from __future__ import annotations

import math

import msgspec

from paritykit.captures.manifest import (
    CACHE_PORTS,
    Manifest,
    Point,
    leading_points,
    module_ranks,
    point_key,
    split_key,
    within,
)
from paritykit.errors import UsageError
from paritykit.mapping.declared import Disagreement, ModuleMap, Place, longest_prefix, told
from paritykit.mapping.landed import SOURCE, merge_blocks
from paritykit.mapping.rules import Block, Ignored, Rule, fused_blocks, repeated_heads, sized_blocks
from paritykit.mapping.user import UserRule, expand
from paritykit.results import Unmatched

NO_CACHE = "the candidate does not show its KV cache; what is read from it shows at the attention's output"


class Misfit(msgspec.Struct, frozen=True, kw_only=True):
    """Two points that stand for each other but have different sizes: no rule makes them one shape."""

    reference: str
    candidate: str
    message: str


class Mapping(msgspec.Struct, kw_only=True):
    """Rules in the reference's execution order; what was left out with a reason; what nobody could explain.

    ``disagreements``: rules, declared or the user's, that say another place than the weights do.
    """

    rules: list[Rule]
    skipped: list[Unmatched]
    unmatched: list[Unmatched]
    misfits: list[Misfit] = []
    disagreements: list[Disagreement] = []
    alike: dict[str, str] = {}
    """Points that are named alike and mean something else, to why that is known; they have no rule that is compared."""
    stated: set[str] = set()
    """Points that the user gave a rule for: these are no matter of names."""


def build_mapping(reference: Manifest, candidate: Manifest, *, user: list[UserRule] | None = None) -> Mapping:
    """Match the points of two captures: the user's rules first, then declared ones, provenance, and equal names.

    Raises UsageError for a user rule that matches nothing, or a reference on several tensor parallel ranks.
    """
    ranks = reference.side.parallel.get("tensor_parallel_size", 1)
    if ranks > 1:
        raise UsageError(
            f"the reference, {reference.side.engine}, ran on {ranks} tensor parallel ranks, and only a candidate's "
            "shards are joined; swap the sides, or capture the reference on one rank"
        )
    mine, ignored = expand(user or [], reference, candidate)
    builder = _Builder(reference, candidate, {r.reference: r for r in mine}, {i.reference: i for i in ignored})
    return builder.build()


class _Builder:
    def __init__(
        self, reference: Manifest, candidate: Manifest, user: dict[str, Rule], ignored: dict[str, Ignored]
    ) -> None:
        self._user = user
        self._ignored = ignored
        self._disagreements: list[Disagreement] = []
        self._modules = ModuleMap(reference, candidate)
        modules = [p.module for p in reference.points]
        self._ours, self._theirs = leading_points(reference.points), leading_points(candidate.points)
        self._ranks = module_ranks(candidate.points)
        self._our_meanings: dict[str, str] = reference.facts.get("meanings", {})
        self._their_meanings: dict[str, str] = candidate.facts.get("meanings", {})
        self._same: dict[str, str] = candidate.facts.get("same", {})
        """A module's other paths, to the one that it is recorded under."""
        compiled: list[str] = candidate.facts.get("compiled", [])
        self._unseen = f"hooks do not fire in the candidate's compiled graph ({compiled[0]})" if compiled else ""
        self._weights = set(filter(None, (longest_prefix(p, set(modules)) for p in self._parameters(reference))))
        self._lost = {d.point: d.reason for d in reference.dropped}
        self._reasons = self._lost | {d.point: d.reason for d in candidate.dropped}

    @staticmethod
    def _parameters(reference: Manifest) -> list[str]:
        return list(reference.facts.get("parameters", {}).values())

    def build(self) -> Mapping:
        rules: dict[str, Rule] = {}
        reasons: dict[str, str] = {}
        misfits: list[Misfit] = []
        for key, point in self._ours.items():
            found = self._ignored[key].reason if key in self._ignored else self._rule(point)
            if isinstance(found, Rule):
                rules[key] = found
            elif isinstance(found, Misfit):
                misfits.append(found)
            elif point.port != "input":
                reasons[key] = found
        for key in [k for k, reason in reasons.items() if not reason]:
            reasons[key] = self._explain(self._ours[key], rules)
        return self._assembled(rules, reasons, misfits)

    def _assembled(self, rules: dict[str, Rule], reasons: dict[str, str], misfits: list[Misfit]) -> Mapping:
        used = {m.candidate for m in misfits} | {k for r in rules.values() for k in r.points}
        left = [Unmatched(side="reference", point=k, reason=r) for k, r in reasons.items()]
        left += [
            Unmatched(side="candidate", point=k, reason=self._extra(p))
            for k, p in self._theirs.items()
            if k not in used and p.port != "input"
        ]
        return Mapping(
            rules=list(rules.values()),
            skipped=[u for u in left if u.reason],
            unmatched=[u for u in left if not u.reason],
            misfits=misfits,
            disagreements=[d for d in self._modules.disagreements if d.reference not in self._user]
            + self._disagreements,
            stated=set(self._user),
        )

    def _explain(self, point: Point, rules: dict[str, Rule]) -> str:
        """Why a reference point without a counterpart is no loss; empty where it is one."""
        if point.source in rules:
            return f"the same tensor as {point.source}, which is compared"
        if self._unseen or point.module in self._weights:
            return self._unseen
        scope, keys = point.module.rpartition(".")[0], list(self._ours)
        later = keys[keys.index(point.key) + 1 :]
        shown = next((k for k in later if k in rules and within(self._ours[k].module, scope)), None)
        return f"no candidate module of this name; it has no weights, and shows at {shown}" if shown else ""

    def _extra(self, point: Point) -> str:
        """Why a candidate point that no rule uses is no loss; empty where nobody knows."""
        if point.module in self._their_meanings:
            return self._their_meanings[point.module]
        partner = self._modules.partners.get(point.module)
        if partner in self._our_meanings:
            return self._our_meanings[partner]
        lost = self._lost.get(point_key(partner or point.module, port=point.port, call=point.call))
        if lost:
            return f"the reference was not recorded there: {lost}"
        return (
            "" if point.module in self._modules.weighted else "it has no weights, and the reference has no such point"
        )

    def _rule(self, point: Point) -> Rule | Misfit | str:
        """The rule for a reference point, or the reason there is none (empty: unknown)."""
        if point.key in self._user:
            fitted = self._fitted(point, self._user[point.key])
            self._hold_against_weights(point, fitted)
            return fitted
        if point.module in self._our_meanings:
            return self._our_meanings[point.module]
        place = self._modules[point.module]
        if place is None:
            return ""
        if place.module in self._their_meanings:
            return self._their_meanings[place.module]
        key = point_key(place.module, port=point.port, call=point.call)
        if key not in self._theirs and place.module in self._same:
            place = place._replace(module=self._same[place.module])
            key = point_key(place.module, port=point.port, call=point.call)
        if key not in self._theirs:
            return self._reasons.get(key, NO_CACHE if point.port in CACHE_PORTS else "")
        return self._sized(point, place, key)

    def _fitted(self, point: Point, rule: Rule) -> Rule | Misfit:
        """A rule of the user's; where it names no columns they follow from the sizes."""
        if rule.blocks:
            return rule
        found = self._theirs[rule.candidate]
        wanted, local = math.prod(point.row), math.prod(found.row)
        blocks = sized_blocks(wanted=wanted, local=local, ranks=self._ranks[found.module])
        return self._misfit(point, rule.candidate) if blocks is None else msgspec.structs.replace(rule, blocks=blocks)

    def _hold_against_weights(self, point: Point, rule: Rule | Misfit) -> None:
        """Note a rule of the user's that says another place than the one where the module's weights landed."""
        place = self._modules[point.module]
        module, port, _ = split_key(rule.candidate)
        if place is None or place.source != SOURCE or point.port or port or isinstance(rule, Misfit):
            return
        whole = Block(self._theirs[rule.candidate].rank, 0, math.prod(point.row))
        blocks = merge_blocks(rule.blocks or (whole,))
        if module != place.module or place.blocks not in (None, blocks):
            said, found = told(module, blocks), told(place.module, place.blocks)
            self._disagreements.append(Disagreement(point.module, said, found))

    def _misfit(self, point: Point, key: str) -> Misfit:
        found = self._theirs[key]
        count = len(self._ranks[found.module])
        if point.port in CACHE_PORTS:
            said = f"heads x width {_heads(point)} against {_heads(found)}"
        else:
            said = f"{math.prod(point.row)} features against {math.prod(found.row)}"
        message = f"{said} on each of {count} rank(s) of {key}"
        return Misfit(reference=point.key, candidate=key, message=message)

    def _sized(self, point: Point, place: Place, key: str) -> Rule | Misfit:
        found, wanted = self._theirs[key], math.prod(point.row)
        if point.port in CACHE_PORTS and len(point.row) == len(found.row) == 2 and point.row[1] != found.row[1]:
            return self._misfit(point, key)  # an MLA latent is no head, though it may be as wide as all heads together
        local, ranks = math.prod(found.row), self._ranks[found.module]
        parts = self._modules.fused.get(place.module)
        if place.blocks and point.port == "" and sum(b.length for b in place.blocks) == wanted:
            whole = place.blocks == (Block(found.rank, 0, wanted),) and local == wanted
            fitting: tuple[Block, ...] | None = () if whole else place.blocks
        elif parts and point.port == "":
            blocks = fused_blocks(parts, ranks=ranks, wanted=place.part)
            whole = len(blocks) == 1 and blocks[0].length == local == wanted
            fitting = () if whole else blocks if sum(b.length for b in blocks) == wanted else None
        else:
            fitting = sized_blocks(wanted=wanted, local=local, ranks=ranks)
        if fitting is None and point.inner:
            fitting = repeated_heads(point.row, found.row, ranks=ranks)
        if fitting is None:
            return self._misfit(point, key)
        if not fitting or len(ranks) > 1:
            return Rule(reference=point.key, candidate=key, blocks=fitting, source=place.source)
        merged = all(b.start == sum(c.length for c in fitting[:n]) for n, b in enumerate(fitting))
        blocks = () if merged and sum(b.length for b in fitting) == local else fitting
        return Rule(reference=point.key, candidate=key, blocks=blocks, source=place.source)


def _heads(point: Point) -> str:
    """The row of a cache in words."""
    return " x ".join(map(str, point.row))
