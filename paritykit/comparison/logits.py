"""Measuring logits: what the difference means for the next token."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import msgspec
import torch

TILE = 1 << 20
"""Logits measured at once; the float64 work on them takes about fifty bytes each."""


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """A row where the sides choose different tokens.

    ``margin`` is how much the reference prefers its own choice to the candidate's: 0 where it was undecided, infinite
    where its logits are NaN. ``max_abs`` is the largest error of a logit in the row; no margin is above twice that.
    """

    row: int
    reference_id: int
    candidate_id: int
    margin: float
    max_abs: float


class LogitMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """How far candidate logits are from reference logits, ``[rows, vocab]`` each.

    - ``row_kl``: for each row KL(reference || candidate) of the softmax distributions, in nats; infinite where the
      candidate rules out what the reference does not, or either side has NaN or +inf. ``kl_mean`` and ``kl_max`` sum
      it up, ``kl_max_row`` says where.
    - ``top_k_agreement``: mean share of the reference's ``k`` best tokens that are among the candidate's ``k`` best;
      a tie with the candidate's k-th counts as among them.
    - ``argmax_agreement``: share of rows where both choose the same token; ``flips`` are the others, row by row.
    - ``row_max_abs``: for each row the largest ``|c - r|`` of a logit, equal infinities aside; infinite where only one
      side is infinite or NaN.
    """

    rows: int
    vocab: int
    k: int
    kl_mean: float
    kl_max: float
    kl_max_row: int
    top_k_agreement: float
    argmax_agreement: float
    flips: list[Flip]
    row_kl: array[float]
    row_max_abs: array[float]

    def as_dict(self) -> dict[str, float]:
        """Every number by name, without those per row; ``flips`` is how many there are."""
        per_row = {"flips", "row_kl", "row_max_abs"}
        numbers = {name: float(getattr(self, name)) for name in self.__struct_fields__ if name not in per_row}
        return numbers | {"flips": float(len(self.flips))}


def measure_logits(reference: torch.Tensor, candidate: torch.Tensor, *, k: int = 5) -> LogitMeasurement:
    """Measure logits ``[rows, vocab]``, row chunk by row chunk, in float64.

    ``k`` is cut to the vocabulary. Raises ValueError for other shapes, none to compare, or ``k < 1``.
    """
    if reference.ndim != 2 or reference.shape != candidate.shape or not reference.numel():
        shapes = f"{list(reference.shape)} and {list(candidate.shape)}"
        raise ValueError(f"both sides must be [rows, vocab] of one shape and not empty, not {shapes}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    rows, vocab = reference.shape
    k = min(k, vocab)
    row_kl, row_max_abs, flips, agreeing = array("d"), array("d"), list[Flip](), 0
    with torch.inference_mode():
        for r, c in _chunks(reference, candidate):
            errors = _row_max_abs(r, c)
            flips += _flips(r, c, errors, first=len(row_kl))
            row_kl.extend(_divergence(r, c).tolist())
            row_max_abs.extend(errors.tolist())
            agreeing += _count_shared(r, c, k)
    worst = max(range(rows), key=row_kl.__getitem__)
    return LogitMeasurement(
        rows=rows,
        vocab=vocab,
        k=k,
        kl_mean=sum(row_kl) / rows,
        kl_max=row_kl[worst],
        kl_max_row=worst,
        top_k_agreement=agreeing / (rows * k),
        argmax_agreement=1 - len(flips) / rows,
        flips=flips,
        row_kl=row_kl,
        row_max_abs=row_max_abs,
    )


def _chunks(reference: torch.Tensor, candidate: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    height = max(1, TILE // reference.shape[1])
    for first in range(0, len(reference), height):
        rows = slice(first, first + height)
        yield reference[rows].to(torch.float64), candidate[rows].to(torch.float64)


def _divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) of each row in nats, ``[rows]``."""
    log_p, log_q = torch.log_softmax(reference, 1), torch.log_softmax(candidate, 1)
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)
    # Rounding may leave a row of equal logits slightly below zero.
    return terms.sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf).clamp_min(0.0)


def _row_max_abs(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Largest error of each row, ``[rows]``: equal infinities are no error, other non-finite pairs are infinite."""
    error = (candidate - reference).abs_()
    return error.masked_fill_(reference == candidate, 0.0).nan_to_num_(nan=torch.inf, posinf=torch.inf).amax(1)


def _count_shared(reference: torch.Tensor, candidate: torch.Tensor, k: int) -> int:
    """How many of the reference's best ``k`` of each row reach the candidate's k-th best."""
    best = reference.topk(k, dim=1).indices
    return int((candidate.gather(1, best) >= candidate.topk(k, dim=1).values[:, -1:]).sum())


def _flips(reference: torch.Tensor, candidate: torch.Tensor, errors: torch.Tensor, *, first: int) -> list[Flip]:
    """Rows of different argmax (the first on a tie), numbered from ``first`` on."""
    chosen, other = reference.argmax(1, keepdim=True), candidate.argmax(1, keepdim=True)
    margins = (reference.gather(1, chosen) - reference.gather(1, other)).squeeze(1).nan_to_num_(nan=torch.inf)
    rows = (chosen != other).squeeze(1).nonzero().squeeze(1)
    found = zip(rows, chosen[rows, 0], other[rows, 0], margins[rows], errors[rows], strict=True)
    return [
        Flip(row=first + int(row), reference_id=int(a), candidate_id=int(b), margin=float(m), max_abs=float(e))
        for row, a, b, m, e in found
    ]
