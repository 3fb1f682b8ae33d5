"""What arrived in the wrong place: order within a tensor, ranks, layers and experts, declared places. Torch-free."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from paritykit.ledger.cells import Cells
from paritykit.ledger.problem import Problem, on_rank, size_of
from paritykit.ledger.subject import WeightSubject, numbers, pattern
from paritykit.provenance.weightmap import Landing, Spans, show, size


def wrong_order(subject: WeightSubject) -> Iterator[Problem]:
    """Rows or columns of a tensor that do not ascend in their parameter, within each of its fused parts."""
    for name, landings in subject.by_tensor.items():
        groups: dict[tuple[str, int, int | None], list[Landing]] = defaultdict(list)
        for x in landings:
            groups[x.parameter, x.rank, subject.part_of(x)].append(x)
        for (parameter, rank, _), group in groups.items():
            moved = _moved(group)
            if moved:
                text = f"{moved} in {parameter}{on_rank(subject, rank)}"
                count = sum(size(x.source) for x in group)
                yield Problem(code="wrong-order", name=name, message=f"{name}: {text}", elements=count, rank=rank)
                break


def _moved(group: list[Landing]) -> str:
    for x in group:
        for k, axis in enumerate(x.axes):
            if axis >= 0 and x.source[axis].step * x.target[k].step < 0:
                return f"axis {axis} runs backwards"
    for axis in range(len(group[0].source)):
        ordered = sorted(group, key=lambda x: [s.low for s in x.target])
        starts = [x.source[axis].low for x in ordered]
        if (
            starts != sorted(starts)
            and len({tuple(s.low for i, s in enumerate(x.source) if i != axis) for x in group}) == 1
        ):
            bad = next(i for i in range(1, len(starts)) if starts[i] < starts[i - 1])
            was = ordered[bad].source
            return f"axis {axis} is out of order: {show(was)} comes after {show(ordered[bad - 1].source)}"
    return ""


def wrong_rank(subject: WeightSubject) -> Iterator[Problem]:
    """Shards that do not follow the ranks: a rank that holds another's."""
    for name, landings in subject.by_tensor.items():
        if subject.ranks == 1:
            return
        firsts: dict[tuple[str, int | None], dict[int, tuple[int, ...]]] = defaultdict(dict)
        for x in landings:
            key = x.parameter, subject.part_of(x)
            low = tuple(s.low for s in x.source)
            firsts[key][x.rank] = min(firsts[key].get(x.rank, low), low)
        for (parameter, _), by_rank in firsts.items():
            starts = [by_rank[r] for r in sorted(by_rank)]
            if starts != sorted(starts):
                text = f"the shards of {name} in {parameter} do not follow the ranks: {starts}"
                yield Problem(code="wrong-slice", name=name, message=text, elements=size_of(subject.shape(name)))
        missing = Cells((x.source for x in landings), subject.shape(name)).counts == 0
        if missing.any():
            twice = [r for r in range(1, subject.ranks) if _same_shard(landings, r)]
            if twice:
                text = f"rank {twice[0]} holds the same shard of {name} as rank {twice[0] - 1}"
                yield Problem(code="wrong-slice", name=name, message=text, rank=twice[0])


def _same_shard(landings: list[Landing], rank: int) -> bool:
    def shard(r: int) -> list[Spans]:
        return sorted((x.source for x in landings if x.rank == r), key=lambda b: [s.low for s in b])

    return bool(shard(rank)) and shard(rank) == shard(rank - 1)


def wrong_index(subject: WeightSubject) -> Iterator[Problem]:
    """A layer's or an expert's weights in another's place."""
    for (parameter, rank), landings in subject.by_parameter.items():
        own = numbers(parameter)
        stacked: dict[str, list[Landing]] = defaultdict(list)
        for x in landings:
            stacked[pattern(x.tensor)].append(x)
        for group in stacked.values():
            names = {x.tensor for x in group}
            if len(names) > 1:
                yield from _stacked(subject, parameter, rank, group)
            elif own and numbers(group[0].tensor)[: len(own)] != own and pattern(parameter).count("*") == len(own):
                text = f"{group[0].tensor} landed in {parameter}{on_rank(subject, rank)}"
                if _siblings_agree(subject, parameter, group[0].tensor):
                    yield Problem(code="wrong-slice", name=group[0].tensor, message=text, rank=rank)


def _siblings_agree(subject: WeightSubject, parameter: str, tensor: str) -> bool:
    """Whether in most parameters of this kind the tensor's numbers are the parameter's own."""
    kind, other = pattern(parameter), pattern(tensor)
    votes = Counter(
        numbers(p) == numbers(x.tensor)[: len(numbers(p))]
        for (p, _), landings in subject.by_parameter.items()
        if pattern(p) == kind
        for x in landings
        if pattern(x.tensor) == other
    )
    return votes[True] > votes[False]


def _stacked(subject: WeightSubject, parameter: str, rank: int, group: list[Landing]) -> Iterator[Problem]:
    """Tensors that differ in one number and are stacked along an axis: their numbers ascend with their places."""
    parts = {tuple(numbers(x.tensor)) for x in group}
    varying = [i for i in range(len(next(iter(parts)))) if len({p[i] for p in parts}) > 1]
    if len(varying) != 1:
        return
    places = sorted({(x.target[0].low, numbers(x.tensor)[varying[0]], x.tensor) for x in group})
    wanted = sorted(n for _, n, _ in places)
    for (place, number, name), expected in zip(places, wanted, strict=True):
        if number != expected:
            where = f"place {place} of {parameter}{on_rank(subject, rank)}"
            text = f"{name} landed in {where}, where number {expected} belongs"
            yield Problem(code="wrong-slice", name=name, message=text, elements=size_of(subject.shape(name)), rank=rank)


def declared_otherwise(subject: WeightSubject) -> Iterator[Problem]:
    """The engine's own rules say one place, and its loader put the weights in another."""
    for name, (parameter, part) in subject.expected.declared.items():
        places = subject.by_tensor.get(name, [])
        homes = {x.parameter for x in places}
        homes |= {a for home in homes for a in subject.aliases.get(home, [])}
        if not places or parameter not in {p for p, _ in subject.parameters}:
            continue
        if parameter not in homes:
            text = f"declared for {parameter}, but landed in {', '.join(sorted(homes))}"
            yield Problem(code="wrong-slice", name=name, message=f"{name}: {text}")
        elif part is not None and subject.parts(parameter):
            seen = {subject.part_of(x) for x in places if x.parameter == parameter}
            if seen != {part}:
                text = f"declared as part {part} of {parameter}, but landed in part {_listed(seen)} of it"
                yield Problem(code="wrong-order", name=name, message=f"{name}: {text}")


def _listed(parts: set[int | None]) -> str:
    return " and ".join("several" if p is None else str(p) for p in sorted(parts, key=str))


def layers_disagree(subject: WeightSubject) -> Iterator[Problem]:
    """A layer whose parameter is laid out unlike the same parameter of most other layers."""
    kinds: dict[str, dict[str, set[tuple[object, ...]]]] = defaultdict(lambda: defaultdict(set))
    for (parameter, rank), landings in subject.by_parameter.items():
        for x in landings:
            kinds[pattern(parameter)][parameter].add((pattern(x.tensor), rank, x.source, x.target, x.axes, x.change))
    for members in kinds.values():
        layouts = Counter(frozenset(v) for v in members.values())
        usual, votes = layouts.most_common(1)[0]
        if len(layouts) < 2 or votes * 2 <= len(members):
            continue
        for parameter, layout in members.items():
            if frozenset(layout) != usual:
                other = next(p for p, v in members.items() if frozenset(v) == usual)
                name = subject.by_parameter[
                    parameter, next(iter({r for p, r in subject.by_parameter if p == parameter}))
                ][0].tensor
                text = f"{parameter} is filled otherwise than {other} and {votes - 1} more like it"
                yield Problem(code="layers-disagree", name=name, message=text)
