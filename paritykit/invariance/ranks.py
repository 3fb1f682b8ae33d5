"""What ranks must agree on: points that each of them has whole, and weights that are together the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch

from paritykit.captures.reader import Capture
from paritykit.diagnose.locate import Graph
from paritykit.invariance.compare import View
from paritykit.ledger.judge import Judged
from paritykit.mapping.rules import Rule
from paritykit.mapping.transform import flat
from paritykit.results import Finding

REPLICAS, PARAMETERS = "#replicas", "#parameters"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Replica:
    """A point that ``rank`` has as ``other`` has it: these columns ``(start, length)``, none for all."""

    key: str
    candidate: str
    rank: int
    other: int
    columns: tuple[tuple[int, int], ...] = ()


def replicas(view: View) -> Iterator[Replica]:
    """The points that several ranks of a stage have, and that the mapping therefore takes from some of them only."""
    size = view.capture.manifest.side.parallel.get("tensor_parallel_size", 1)
    for key, rule in view.rules.items():
        having = sorted(view.capture.points[rule.candidate])
        ranks = [r for r in having if r // size == having[0] // size]
        used = sorted({b.rank for b in rule.blocks}) or ranks[:1]
        for rank in ranks:
            if rank not in used and rank > used[0]:
                other = max(u for u in used if u < rank)
                yield Replica(key, rule.candidate, rank, other, _columns(rule, other))


def _columns(rule: Rule, rank: int) -> tuple[tuple[int, int], ...]:
    return tuple((b.start, b.length) for b in rule.blocks if b.rank == rank)


def replica_findings(view: View, graph: Graph, *, pairs: tuple[tuple[str, str], ...], **told: str) -> list[Finding]:
    """One finding for each case: how many replicated points have not the same bits on all ranks, and the first of them.

    ``pairs`` are (case to name, case of the view); ``told`` are the finding's check and condition. Empty where nothing
    is on several ranks.
    """
    found = sorted(replicas(view), key=lambda r: graph.order(r.key))
    return [_finding(view, graph, found, shown, case, **told) for shown, case in pairs] if found else []


def _finding(
    view: View, graph: Graph, found: list[Replica], shown: str, case: str, *, check: str, condition: str
) -> Finding:
    differing = [(r, place) for r in found if (place := first_difference(view.capture, r, case)) is not None]
    keys = list(dict.fromkeys(r.key for r, _ in differing))
    points = len({r.key for r in found})
    finding = Finding(
        check=check,
        case=shown,
        point=REPLICAS,
        verdict="fail" if differing else "pass",
        metric="differing_points",
        value=float(len(keys)),
        allowed=0.0,
        allowed_source="what several ranks have, they have with the same bits",
        order=graph.order(keys[0]) if keys else graph.order(REPLICAS),
        message=f"{condition}: {points} points are the same on all ranks that have them",
        condition=condition,
        mapping=f"{points} points that several ranks have",
    )
    if not keys:
        return finding
    (first, place), others = differing[0], [r for r, _ in differing if r.key == keys[0]]
    ranks = ", ".join(f"{r.other} and {r.rank}" for r in others)
    where = f"{condition}: {first.key} differs between ranks {ranks}, from position {place} on"
    more = f"; so do {len(keys) - 1} more of {points} points" if len(keys) > 1 else ""
    blamed = graph.blame(first.key)
    return msgspec.structs.replace(
        finding, message=where + more, origin="introduced", located=blamed, candidate_point=first.candidate
    )


def first_difference(capture: Capture, replica: Replica, case: str) -> int | None:
    """The first position of a case at which two ranks have other bits, the first of all if they have other positions.

    None where they have the same.
    """
    ours, theirs = (_rows(capture, replica, case, rank) for rank in (replica.other, replica.rank))
    if ours.shape != theirs.shape:
        return 0
    rows = (ours != theirs).any(1).nonzero().flatten()
    return int(rows[0]) if len(rows) else None


def _rows(capture: Capture, replica: Replica, case: str, rank: int) -> torch.Tensor:
    """The bits of the replica's columns, as integers, ``[tokens, columns]``."""
    rows = capture.rows(replica.candidate, case, rank=rank)
    if not len(rows):
        return rows.view(0, 0)
    rows = flat(rows)
    parts = [rows[:, start : start + length] for start, length in replica.columns] or [rows]
    return torch.cat([p.contiguous().view(BITS[p.element_size()]) for p in parts], dim=1)


def weight_findings(base: Judged, varied: Judged, *, ranks: int, check: str, condition: str) -> list[Finding]:
    """What is wrong with the weights of the varied run, and is not with those of the base in the same way.

    One finding that passes where nothing is: every element of the checkpoint is there once, or as a declared replica.
    """
    known = {(f.point, f.metric) for f in base.findings if f.verdict == "fail"}
    wrong = [f for f in varied.findings if f.verdict == "fail" and (f.point, f.metric) not in known]
    if wrong:
        told = (msgspec.structs.replace(f, message=f"{condition}: {f.message}") for f in wrong)
        return [msgspec.structs.replace(f, check=check, condition=condition) for f in told]
    tensors = sum(f.verdict == "pass" for f in varied.findings)
    return [
        Finding(
            check=check,
            case="",
            point=PARAMETERS,
            verdict="pass",
            metric="differing",
            value=0.0,
            allowed=0.0,
            allowed_source="every element arrives once or as a declared replica, unchanged",
            message=f"{condition}: {tensors} tensors, all their elements on {ranks} ranks together",
            condition=condition,
            mapping="weight provenance",
        )
    ]
