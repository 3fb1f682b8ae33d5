"""A kernel that steps through memory by another distance than that of tokens: rows are turned that are others'.

A rotary kernel is handed queries and keys as they lie in memory, with the distance from one token to the next. Where it
takes that of heads for it, token ``n`` turns what lies ``n`` heads after the first one: heads of the first tokens, or
what lies beside the keys in a fused projection. Most of the rest is never turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from paritykit.diagnose.bench.attention import Attention
from paritykit.diagnose.bench.form import Place
from paritykit.diagnose.causes.rotary import rotated
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

LARGEST = 4096
"""Tokens of one step that are followed one by one."""


def head_strides(scene: Scene) -> Iterator[Trial]:
    """Queries, keys or both rotated at the distance of heads, in the order in which the candidate ran its tokens."""
    attention = rotated(scene)
    if attention is None or not attention.rotation.dims or scene.port == "key_cache" or scene.ranks > 1:
        return
    for sides, whose in (((0, 1), "queries and keys"), ((0,), "queries"), ((1,), "keys")):
        label = f"with {whose} rotated from token to token at the distance of heads in memory"
        yield Trial(label, partial(_predicted, attention, sides))


def _predicted(attention: Attention, sides: tuple[int, ...], case: str) -> torch.Tensor:
    heads = list(attention.turned(case))
    for side in sides:
        place = attention.form.places[side]
        made: dict[str, torch.Tensor] = attention.once("strides", side, lambda p=place: _all_turned(attention, p))
        own = made[case][: len(heads[side])]
        dims, groups = attention.rotation.dims, heads[side].shape[1]
        turned = torch.stack([own[:, n + _order(attention)] for n in place.starts(groups)], dim=1)
        heads[side] = torch.cat((turned, attention.plain(case)[side][..., dims:]), dim=-1)
    return attention.predict(case, attention.output((heads[0], heads[1], heads[2])))


def _all_turned(attention: Attention, place: Place) -> dict[str, torch.Tensor]:
    """The candidate's rows of a place, ``[positions, columns]`` of the reference's point, as such a kernel leaves them.

    Raises LookupError where the candidate does not show them as they lie in its memory.
    """
    scene, capture = attention.scene, attention.scene.candidate_capture
    rule, cases = scene.rules[place.key], [c.id for c in capture.manifest.cases]
    if rule.made or len(rule.blocks) > 1:
        raise LookupError(f"{place.key} lies otherwise in the candidate's memory")
    start = rule.blocks[0].start if rule.blocks else 0
    memory = {c: capture.rows(rule.candidate, c).to(scene.dtype).flatten(1).clone() for c in cases}
    for step in capture.manifest.steps:
        flat = [(cases[s.case], p) for s in step for p in range(s.start, s.start + s.length)]
        if len(flat) > LARGEST or any(p >= len(memory[c]) for c, p in flat):
            raise LookupError(f"{place.key} is not shown in every position")
        rows = torch.stack([memory[c][p] for c, p in flat])
        _turn_along(attention, rows.view(-1), start + place.start, place.step, [p for _, p in flat])
        for (case, position), row in zip(flat, rows, strict=True):
            memory[case][position] = row
    width = scene.width(place.key)
    return {c: rows[:, start : start + width] for c, rows in memory.items()}


def _turn_along(attention: Attention, memory: torch.Tensor, first: int, step: int, positions: list[int]) -> None:
    """Turn in place what lies at ``first``, and then every ``step`` further on, each by its token's position."""
    own, order = attention.rotation, _order(attention)
    for number, position in enumerate(positions):
        part = memory[first + number * step :][: own.dims]
        if len(part) == own.dims:
            part[order] = own.turn(part[order][None, None], torch.tensor([position]))[0, 0]


def _order(attention: Attention) -> torch.Tensor:
    """Where in memory, from a head's place on, lie the elements that are turned."""
    order = attention.form.order
    return torch.arange(attention.rotation.dims) if order is None else order[: attention.rotation.dims]
