"""Carrying a rule out: candidate tensors of all ranks to the reference's columns, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from paritykit.mapping.rules import Block, Rule

ReadRank = Callable[[str, int | None], torch.Tensor]
"""Gives the rows of a candidate point on a rank, or on the lowest that has it, ``[tokens, ...]``."""


def flat(rows: torch.Tensor) -> torch.Tensor:
    """``[tokens, features]`` of ``[tokens, ...]``."""
    return rows if rows.dim() == 2 else rows.reshape(rows.shape[0], -1)


def apply_rule(rule: Rule, read: ReadRank) -> torch.Tensor:
    """The candidate's ``[tokens, features]`` in the reference's column order."""
    if not rule.blocks:
        return _one(rule, None, read)
    return join({rank: _one(rule, rank, read) for rank in sorted({b.rank for b in rule.blocks})}, rule.blocks)


def _one(rule: Rule, rank: int | None, read: ReadRank) -> torch.Tensor:
    rows = read(rule.candidate, rank)
    if rule.plus:
        rows = rows + read(rule.plus, rank)
    if rule.minus or rule.gate[1] or rule.factor != 1.0:
        rows = _made(rule, rank, rows, read)
    return flat(rows.transpose(-1, -2) if rule.transpose else rows)


def _made(rule: Rule, rank: int | None, rows: torch.Tensor, read: ReadRank) -> torch.Tensor:
    """What is found by numbers is computed in float32 at least: it must add no rounding of its own."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if rule.minus:
        rows = rows - read(rule.minus, rank)
    how, key = rule.gate
    if key:
        rows = gated(rows, read(key, rank), how=how)
    return rows * rule.factor


def gated(rows: torch.Tensor, gate: torch.Tensor, *, how: str) -> torch.Tensor:
    """``rows``, ``[tokens, features]``, with ``gate``, ``[tokens, features or 1]``, as ``rules.GATES`` says ``how``."""
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    gate = gate.sigmoid() if how.endswith("sigmoid") else gate
    return rows / gate if how.startswith("over") else rows * gate


def join(tensors: Mapping[int, torch.Tensor], blocks: tuple[Block, ...]) -> torch.Tensor:
    """The blocks side by side, ``[tokens, features]``; a view where there is only one."""
    parts = [tensors[b.rank][:, b.start : b.start + b.length] for b in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def split(whole: torch.Tensor, blocks: tuple[Block, ...], *, widths: Mapping[int, int]) -> dict[int, torch.Tensor]:
    """Inverse of ``join``: each rank's ``[tokens, width]`` with its blocks filled from ``whole``, zero elsewhere."""
    tensors = {rank: whole.new_zeros(whole.shape[0], width) for rank, width in widths.items()}
    start = 0
    for block in blocks:
        tensors[block.rank][:, block.start : block.start + block.length] = whole[:, start : start + block.length]
        start += block.length
    return tensors
