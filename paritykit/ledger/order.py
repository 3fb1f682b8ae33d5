"""What arrived in the wrong place: order within a tensor, ranks, layers and experts, declared places. Torch-free."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice, pairwise

from paritykit.ledger.problem import Problem, on_rank, size_of
from paritykit.ledger.subject import WeightSubject
from paritykit.provenance.cells import Cells
from paritykit.provenance.names import numbers, pattern
from paritykit.provenance.weightmap import Landing, Spans, show, size


def wrong_order(subject: WeightSubject) -> Iterator[Problem]:
    """Rows or columns of a tensor that do not ascend in their parameter, rank after rank, within each fused part."""
    for name, landings in subject.by_tensor.items():
        groups: dict[tuple[str, int | None], dict[Spans, Landing]] = defaultdict(dict)
        for x in landings:
            groups[x.parameter, subject.part_of(x)].setdefault(x.source, x)
        for (parameter, _), group in groups.items():
            moved = _moved(list(group.values()))
            if moved:
                where, rank = moved
                count = sum(size(x.source) for x in group.values())
                text = f"{name}: {where} in {parameter}{on_rank(subject, rank)}"
                cancels = _cancels(subject, name)
                yield Problem(code="wrong-order", name=name, message=text, elements=count, rank=rank, cancels=cancels)
                break


def _cancels(subject: WeightSubject, name: str) -> str:
    """Why the order of a tensor's rows changes no product of two modules; empty where it may.

    Each head's queries and keys may be in another order if it is the same one; whether rotary embedding follows it is
    no matter of the weights, and shows in what attention gives.
    """
    own = _order_of(subject, name)
    others = (n for n in subject.by_tensor if _module(n) != _module(name) and _scope(n) == _scope(name))
    other = None if own is None else next((n for n in others if _order_of(subject, n) == own), None)
    if own is None or other is None:
        return ""
    return f"each {len(own)} rows are in the order that those of {other} are in too: that cancels in a product of both"


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _scope(name: str) -> str:
    """What holds the module of a tensor."""
    return _module(_module(name))


def _order_of(subject: WeightSubject, name: str) -> tuple[int, ...] | None:
    """The order of rows in each block of as many, the same in every block and on every rank; None for no such order."""
    rows: dict[tuple[str, int | None, int], dict[int, int]] = defaultdict(dict)
    for x in subject.by_tensor[name]:
        axis = next((k for k, a in enumerate(x.axes) if a == 0), None)
        if axis is None:
            return None
        places = zip(x.target[axis].places(), x.source[0].places(), strict=True)
        rows[x.parameter, subject.part_of(x), x.rank].update(places)
    orders = {_block(found) for found in rows.values()}
    return orders.pop() if len(orders) == 1 else None


def _block(rows: dict[int, int]) -> tuple[int, ...] | None:
    """The smallest block of rows that holds one order all through; None where rows leave it, or all are in place.

    >>> _block({0: 0, 1: 2, 2: 1, 3: 3, 4: 4, 5: 6, 6: 5, 7: 7})
    (0, 2, 1, 3)
    """
    first = min(rows.values())
    order = [rows[place] - first for place in sorted(rows)]
    count = len(order)
    for length in (n for n in range(2, count + 1) if count % n == 0):
        block = order[:length]
        if sorted(block) == list(range(length)) and order == [n + b for n in range(0, count, length) for b in block]:
            return None if block == sorted(block) else tuple(block)
    return None


def _moved(group: list[Landing]) -> tuple[str, int] | None:
    """What is out of order, and on which rank."""
    for x in group:
        for k, axis in enumerate(x.axes):
            if axis >= 0 and x.source[axis].step * x.target[k].step < 0:
                return f"axis {axis} runs backwards", x.rank
    ordered = sorted(group, key=lambda x: (x.rank, [s.low for s in x.target]))
    for axis in range(len(group[0].source)):
        if len({tuple(s for i, s in enumerate(x.source) if i != axis) for x in group}) > 1:
            continue
        for one, other in pairwise(ordered):
            a, b = one.source[axis], other.source[axis]
            if b.low < a.low:
                return f"axis {axis} is out of order: {show(other.source)} comes after {show(one.source)}", other.rank
            if b.low < max(a.start, a.last):
                return f"axis {axis} is interleaved: {show(other.source)} comes after {show(one.source)}", other.rank
    return None


def wrong_rank(subject: WeightSubject) -> Iterator[Problem]:
    """Shards that do not follow the ranks: a rank that holds another's."""
    for name, landings in subject.by_tensor.items():
        if subject.ranks == 1:
            return
        firsts: dict[tuple[str, int | None, int], dict[int, tuple[int, ...]]] = defaultdict(dict)
        for x in landings:
            key = x.parameter, subject.part_of(x), subject.ledgers[x.rank].stage
            low = tuple(s.low for s in x.source)
            firsts[key][x.rank] = min(firsts[key].get(x.rank, low), low)
        for (parameter, _, _), by_rank in firsts.items():
            starts = [by_rank[r] for r in sorted(by_rank)]
            if starts != sorted(starts):
                text = f"the shards of {name} in {parameter} do not follow the ranks: {starts}"
                yield Problem(code="wrong-slice", name=name, message=text, elements=size_of(subject.shape(name)))
        missing = Cells((x.source for x in landings), subject.shape(name)).counts == 0
        if missing.any():
            yield from islice((p for ranks in subject.stages for p in _repeated(subject, name, ranks)), 1)


def _repeated(subject: WeightSubject, name: str, ranks: list[int]) -> Iterator[Problem]:
    """Ranks of a stage that hold the shard of another one, and should not."""
    shards = [{x.source for x in subject.by_tensor[name] if x.rank == rank} for rank in ranks]
    for number, own in enumerate(shards):
        replicas = max(1, sum(map(size, own)) * len(ranks) // size_of(subject.shape(name)))
        if own and number >= replicas and own == shards[number - replicas]:
            rank, other = ranks[number], ranks[number - replicas]
            text = f"rank {rank} holds the same shard of {name} as rank {other}"
            yield Problem(code="wrong-slice", name=name, message=text, rank=rank)


def wrong_index(subject: WeightSubject) -> Iterator[Problem]:
    """A layer's or an expert's weights in another's place."""
    alike = _numbered_alike(subject)
    for (parameter, rank), landings in subject.by_parameter.items():
        own = numbers(parameter)
        stacked: dict[str, dict[str, Landing]] = defaultdict(dict)
        for x in landings:
            stacked[pattern(x.tensor)].setdefault(x.tensor, x)
        for kind, group in stacked.items():
            if len(group) > 1:
                yield from _stacked(subject, parameter, rank, list(group.values()))
            for name in group:
                if numbers(name)[: len(own)] != own and (pattern(parameter), kind) in alike:
                    text = f"{name} landed in {parameter}{on_rank(subject, rank)}"
                    yield Problem(code="wrong-slice", name=name, message=text, rank=rank)


def _numbered_alike(subject: WeightSubject) -> set[tuple[str, str]]:
    """Kinds of parameter and tensor that should have one number: most do, or they are in no order at all."""
    seen: dict[tuple[str, str], set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for (parameter, _), landings in subject.by_parameter.items():
        own = tuple(numbers(parameter))
        for x in landings:
            seen[pattern(parameter), pattern(x.tensor)].add((own, tuple(numbers(x.tensor)[: len(own)])))
    return {
        kinds
        for kinds, pairs in seen.items()
        if sum(a == b for a, b in pairs) * 2 > len(pairs)
        or [b for _, b in sorted(pairs)] != sorted(b for _, b in pairs)
    }


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
    """The engine's own rules, or an equal name, say one place, and its loader put the weights in another."""
    known = {p for p, _ in subject.parameters}
    equal = {n: (n, None) for n in subject.by_tensor if n in known}
    for name, (parameter, part) in {**equal, **subject.expected.declared}.items():
        places = subject.by_tensor.get(name, [])
        if not places or parameter not in known:
            continue
        there = [x for x in places if parameter in subject.names_of(x.parameter)]
        if not there:
            homes = {other for x in places for other in subject.names_of(x.parameter)}
            how = "declared for" if name in subject.expected.declared else "named like"
            text = f"{how} {parameter}, but landed in {', '.join(sorted(homes))}"
            yield Problem(code="wrong-slice", name=name, message=f"{name}: {text}")
        elif part is not None and subject.parts(parameter):
            seen = {subject.part_of(x) for x in there}
            if seen != {part}:
                text = f"declared as part {part} of {parameter}, but landed in part {_listed(seen)} of it"
                yield Problem(code="wrong-order", name=name, message=f"{name}: {text}")


def _listed(parts: set[int | None]) -> str:
    return " and ".join("several" if p is None else str(p) for p in sorted(parts, key=str))


def layers_disagree(subject: WeightSubject) -> Iterator[Problem]:
    """A layer whose parameter is laid out unlike the same parameter, of the same shape, of most other layers."""
    kinds: dict[object, dict[str, set[tuple[object, ...]]]] = defaultdict(lambda: defaultdict(set))
    for (parameter, rank), landings in subject.by_parameter.items():
        for x in landings:
            kinds[pattern(parameter), subject.parameters[parameter, rank].shape][parameter].add(
                (pattern(x.tensor), subject.shards[rank], x.source, x.target, x.axes, x.change)
            )
    for members in kinds.values():
        layouts = Counter(frozenset(v) for v in members.values())
        usual, votes = layouts.most_common(1)[0]
        if len(layouts) < 2 or votes * 2 <= len(members):
            continue
        for parameter, layout in members.items():
            if frozenset(layout) != usual:
                other = next(p for p, v in members.items() if frozenset(v) == usual)
                name, *more = [x.tensor for x in subject.found.landings if x.parameter == parameter]
                names = (parameter, name, *more)
                text = f"{parameter} is filled otherwise than {other} and {votes - 1} more like it"
                yield Problem(code="layers-disagree", name=name, message=text, names=names)
