"""Logit metrics against plain float64 numpy, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.comparison import logits
from paritykit.comparison.logits import measure_logits


def draw(seed: int, rows: int, vocab: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, vocab, generator=generator) * 3
    return reference, reference + noise * torch.randn(rows, vocab, generator=generator)


def oracle_kl(reference: torch.Tensor, candidate: torch.Tensor) -> list[float]:
    r, c = reference.double().numpy(), candidate.double().numpy()
    p = np.exp(r - r.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    q = np.exp(c - c.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    return (p * np.log(p / q)).sum(1).tolist()


@given(st.integers(0, 9999), st.integers(1, 9), st.integers(1, 50), st.sampled_from([1e-3, 0.1, 2.0]),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_agrees_with_float64(seed, rows, vocab, noise, dtype):
    reference, candidate = (x.to(dtype) for x in draw(seed, rows, vocab, noise))
    got = measure_logits(reference, candidate)
    kl = oracle_kl(reference, candidate)
    assert list(got.row_kl) == pytest.approx(kl, rel=1e-6, abs=1e-14)
    assert (got.kl_mean, got.kl_max) == pytest.approx((np.mean(kl), max(kl)), rel=1e-6, abs=1e-14)
    assert got.row_kl[got.kl_max_row] == got.kl_max
    errors = (candidate.double() - reference.double()).abs().amax(1).tolist()
    assert list(got.row_max_abs) == errors
    check_flips(reference.double().numpy(), candidate.double().numpy(), got)


def check_flips(r: np.ndarray, c: np.ndarray, got: logits.LogitMeasurement) -> None:
    a, b = r.argmax(1), c.argmax(1)
    rows = np.flatnonzero(a != b)
    assert [(f.row, f.reference_id, f.candidate_id) for f in got.flips] == [(i, a[i], b[i]) for i in rows]
    assert [f.margin for f in got.flips] == [r[i, a[i]] - r[i, b[i]] for i in rows]
    assert all(0 <= f.margin <= 2 * f.max_abs for f in got.flips)
    assert [f.max_abs for f in got.flips] == [got.row_max_abs[i] for i in rows]
    assert got.argmax_agreement == pytest.approx(1 - len(rows) / len(r))


@given(st.integers(0, 9999), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_top_k_is_the_share_of_the_two_sets(seed, k):
    reference, candidate = draw(seed, 6, 20, 1.0)
    sets = [[set(row) for row in x.argsort(1, descending=True)[:, :k].tolist()] for x in (reference, candidate)]
    shares = [len(a & b) / k for a, b in zip(*sets, strict=True)]
    assert measure_logits(reference, candidate, k=k).top_k_agreement == pytest.approx(np.mean(shares))


def test_chunks_change_nothing(monkeypatch):
    reference, candidate = draw(1, 23, 40, 0.5)
    whole = measure_logits(reference, candidate)
    for tile in (1, 40, 150):
        monkeypatch.setattr(logits, "TILE", tile)
        assert measure_logits(reference, candidate) == whole
    assert whole.flips


def test_identity_is_perfect():
    reference, _ = draw(1, 4, 30, 0)
    got = measure_logits(reference, reference.clone())
    assert (got.kl_mean, got.kl_max, got.top_k_agreement, got.argmax_agreement, got.flips) == (0, 0, 1, 1, [])
    assert list(got.row_max_abs) == [0] * 4
    assert got.as_dict() == {"rows": 4, "vocab": 30, "k": 5, "kl_mean": 0, "kl_max": 0, "kl_max_row": 0,
                             "top_k_agreement": 1, "argmax_agreement": 1, "flips": 0}  # fmt: skip


def test_a_shift_of_all_logits_changes_no_probability():
    reference = draw(1, 4, 30, 0)[0].double()
    got = measure_logits(reference, reference + 2.5)
    assert got.kl_max == pytest.approx(0, abs=1e-14)
    assert list(got.row_max_abs) == pytest.approx([2.5] * 4)
    assert not got.flips


def test_smallest_divergence_is_not_lost_in_rounding():
    reference = torch.zeros(1, 2, dtype=torch.float64)
    candidate = torch.tensor([[1e-5, -1e-5]], dtype=torch.float64)
    assert measure_logits(reference, candidate).kl_max == pytest.approx(math.log(math.cosh(1e-5)), rel=1e-4)


def test_masked_on_both_sides_is_equal():
    reference = torch.tensor([[1.0, 2.0, -math.inf]])
    got = measure_logits(reference, reference.clone(), k=2)
    assert (got.kl_max, list(got.row_max_abs), got.top_k_agreement) == (0, [0], 1)


def test_masked_on_one_side_is_not():
    whole, masked = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[1.0, 2.0, -math.inf]])
    lost, made = measure_logits(whole, masked), measure_logits(masked, whole)
    assert (lost.kl_max, lost.row_max_abs[0]) == (math.inf, math.inf)
    assert made.kl_max == pytest.approx(math.log1p(math.exp(0.5) / (math.e + math.exp(2))), rel=1e-6)
    assert made.row_max_abs[0] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_rows_stand_out(bad):
    reference, candidate = draw(1, 3, 8, 0.1)
    candidate[1, 4] = bad
    for r, c in ((reference, candidate), (candidate, reference)):
        got = measure_logits(r, c)
        assert (got.kl_max, got.kl_max_row, got.row_max_abs[1]) == (math.inf, 1, math.inf)
        assert not math.isnan(got.kl_mean)
        assert all(f.margin >= 0 for f in got.flips)


def test_a_tie_with_the_kth_counts_as_among_them():
    reference = torch.tensor([[3.0, 2.0, 1.0]])
    candidate = torch.tensor([[3.0, 2.0, 2.0]])
    assert measure_logits(reference, candidate, k=2).top_k_agreement == 1
    assert measure_logits(reference, reference.flip(1), k=1).top_k_agreement == 0


def test_k_is_cut_to_the_vocabulary():
    assert measure_logits(*draw(1, 2, 3, 1.0), k=10).k == 3


def test_refuses_what_cannot_be_measured():
    with pytest.raises(ValueError, match=r"\[rows, vocab\]"):
        measure_logits(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="of one shape"):
        measure_logits(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not empty"):
        measure_logits(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="at least 1"):
        measure_logits(torch.zeros(2, 3), torch.zeros(2, 3), k=0)
