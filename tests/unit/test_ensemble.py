"""The ensemble: roundings drawn anew, measured against the truth, and the guards made of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.integrations.moe  # noqa: F401 an operation of its own
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paritykit.comparison.drawn import drawn_guards, each_chance, quantile
from paritykit.comparison.ensemble import Ensemble, EnsembleWriter, PointDraws
from paritykit.comparison.floor import DRAWN_FACTOR, Judged, judge_floor
from paritykit.comparison.metrics import measure
from paritykit.comparison.spread import SpreadMeter
from paritykit.engines.drawing import _joined, _measured
from paritykit.engines.redraw import Redrawing
from paritykit.errors import CaptureFormatError

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DRAWS, ROWS, FEATURES, FLOOR = 8, 60, 64, 1e-2
LUCK = each_chance(2000)


def sides(seed: int, *, rows: int = ROWS, features: int = FEATURES, sink: float = 1.0) -> list[torch.Tensor]:
    """Truth, twin, candidate and all draws, with noise of one size, each row's in proportion to the row."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, features, generator=generator)
    truth[0] *= sink
    size = truth.norm(dim=1, keepdim=True) / math.sqrt(features)
    return [truth, *(truth + FLOOR * size * torch.randn(truth.shape, generator=generator) for _ in range(DRAWS + 2))]


def drawn(truth: torch.Tensor, *copies: torch.Tensor) -> PointDraws:
    return _joined(_measured(truth, torch.stack(copies)))


def judged(truth: torch.Tensor, twin: torch.Tensor, candidate: torch.Tensor, draws: PointDraws) -> Judged:
    meter = SpreadMeter()
    meter.update(truth, twin, candidate)
    return judge_floor(
        measure(truth, candidate), meter.result(), dtype="float32", factor=DRAWN_FACTOR, draws=draws, luck=LUCK
    )


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 80), st.sampled_from([3, 16, 100]), st.sampled_from([1.0, 300.0]))
def test_one_more_draw_passes_whatever_the_shape(seed: int, rows: int, features: int, sink: float) -> None:
    truth, twin, candidate, *copies = sides(seed, rows=rows, features=features, sink=sink)
    found = judged(truth, twin, candidate, drawn(truth, *copies))
    assert found.verdict == "pass", found
    assert "draws" in found.source


@pytest.mark.parametrize("times", [2.5, 10.0])
def test_a_larger_error_fails(times: float) -> None:
    truth, twin, candidate, *copies = sides(1)
    found = judged(truth, twin, truth + times * (candidate - truth), drawn(truth, *copies))
    assert found.verdict == "fail"


def test_one_wrong_row_and_one_wrong_channel_fail() -> None:
    truth, twin, candidate, *copies = sides(2)
    draws = drawn(truth, *copies)
    row, channel = candidate.clone(), candidate.clone()
    row[17] = truth[17] + 12 * (row[17] - truth[17])
    channel[:, 5] = truth[:, 5] + 12 * (channel[:, 5] - truth[:, 5])
    assert judged(truth, twin, row, draws).metric == "position_rel_l2"
    assert judged(truth, twin, channel, draws).verdict == "fail"


def test_a_token_whose_rounding_is_amplified_in_every_draw_is_no_failure() -> None:
    truth, *rest = sides(3)
    for tensor in rest:
        tensor[9] = truth[9] + 40 * (tensor[9] - truth[9])
    twin, candidate, *copies = rest
    assert judged(truth, twin, candidate, drawn(truth, *copies)).verdict == "pass"
    calm = [c.clone() for c in copies]
    for one in calm:
        one[9] = truth[9] + (one[9] - truth[9]) / 40
    assert judged(truth, twin, candidate, drawn(truth, *calm)).verdict == "fail"


def test_positions_can_be_picked() -> None:
    truth, _, _, *copies = sides(4)
    some = [3, 4, 30]
    whole, part = drawn(truth, *copies), drawn(truth[some], *(c[some] for c in copies))
    picked = whole.select(some)
    for name in ("whole", "scale", "row_scale"):
        assert getattr(picked, name) == pytest.approx(getattr(part, name), rel=1e-5, abs=1e-8)
    assert picked.row == pytest.approx(part.row, rel=0.5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    truth, _, _, *copies = sides(5)
    found, writer = drawn(truth, *copies), EnsembleWriter()
    writer.add(found, point="a", case="x", also=["b"])
    writer.write(tmp_path, draws=DRAWS, seed=7, dtype="bfloat16")
    ensemble = Ensemble.open(tmp_path)
    again = ensemble.at("b", "x")
    assert again is not None
    assert again.squares == pytest.approx(found.squares)
    assert again.channel == pytest.approx(found.channel, rel=1e-6)
    assert ensemble.at("b", "y") is None
    assert ensemble.draws == DRAWS
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(CaptureFormatError, match="holds no ensemble"):
        Ensemble.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_roundings_are_drawn_anew_and_as_large_as_they_are(dtype: torch.dtype) -> None:
    """Of a stack of layers: each copy errs as much as a plain run does, and no two in the same way."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    layers = [nn.Linear(256, 256).to(dtype) for _ in range(4)]
    x = torch.randn(1, 50, 256).to(dtype)

    with torch.no_grad():
        plain = _stack(layers, x)
        with Redrawing(1):
            found = _stack(layers, x.expand(8, -1, -1))
        truth = _stack([copy.deepcopy(layer).to(wide) for layer in layers], x.to(wide))
    error = [(c.to(wide) - truth[0]).norm() / truth.norm() for c in found]
    own = max((x.to(wide) - truth).norm() / truth.norm() for x in (plain, _stack(layers, x, product=in_order)))
    assert all(0.7 * own < e < 1.7 * own for e in error)
    assert len({float(e) for e in error}) == 8
    assert found.dtype == dtype


def _stack(layers: list[nn.Linear], x: torch.Tensor, *, product: Product | None = None) -> torch.Tensor:
    for layer in layers:
        x = nn.functional.softsign(layer(x) if product is None else product(x, layer.weight.t()) + layer.bias) * 2
    return x


def in_order(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product in float32 whose terms are added one after the other."""
    found, left, right = torch.zeros(*left.shape[:-1], right.shape[-1]), left.float(), right.float()
    with torch.no_grad():
        for k in range(left.shape[-1]):
            found.addcmul_(left[..., k : k + 1], right[..., k : k + 1, :])
    return found


@pytest.mark.parametrize(("rows", "length", "columns"), [(40, 576, 64), (2, 1536, 300), (64, 40, 64), (150, 64, 1)])
@pytest.mark.parametrize("how", ["mm", "addmm", "bmm", "mv", "grouped"])
@pytest.mark.parametrize("mean", [0.0, 0.5], ids=["of both signs", "of one sign"])
def test_sums_of_float32_are_drawn_as_large_as_in_their_longest_order(
    how: str, rows: int, length: int, columns: int, mean: float
) -> None:
    """Terms of one sign make partial sums that grow to the end."""
    torch.manual_seed(rows)
    rows, columns = (max(rows, 300), 1) if how == "mv" else (rows, max(columns, 4) if how == "grouped" else columns)
    left, right = torch.randn(2, rows, length) + mean, torch.randn(2, length, columns) + mean
    if how == "bmm":
        call = lambda: left @ right  # noqa: E731
    elif how == "mv":
        call = lambda: torch.stack([torch.mv(a, b[:, 0]) for a, b in zip(left, right, strict=True)])[..., None]  # noqa: E731
    elif how == "grouped":
        ends = torch.tensor([rows, rows, 2 * rows], dtype=torch.int32)
        call = lambda: nn.functional.grouped_mm(left.flatten(0, 1), right[[0, 0, 1]], offs=ends).view(2, rows, -1)  # noqa: E731
    else:
        zero = torch.zeros(columns)
        product = torch.mm if how == "mm" else lambda a, b: torch.addmm(zero, a, b)
        call = lambda: torch.stack([product(a, b) for a, b in zip(left, right, strict=True)])  # noqa: E731
    truth = left.double() @ right.double()

    def error(found: torch.Tensor) -> float:
        return float((found.double() - truth).norm() / truth.norm())

    found = []
    for seed in range(8):
        with Redrawing(seed):
            found.append(call())
    serial = error(torch.stack([in_order(*x) for x in zip(left, right, strict=True)]))
    drawn = sum(map(error, found)) / 8
    assert 0.8 * serial < drawn < 1.7 * max(serial, error(call()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", [nn.functional.grouped_mm, torch.ops.transformers.grouped_mm_fallback])
def test_products_in_groups_are_drawn_as_single_ones(op: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    """Groups of no row, of one and of many; rows after the last group's are not computed."""
    torch.manual_seed(0)
    sizes, right = [0, 1, 30, 9], nn.Parameter(torch.randn(4, 48, 256).transpose(1, 2).to(dtype))
    left, ends = torch.randn(44, 256).to(dtype), torch.tensor(sizes).cumsum(0).to(torch.int32)
    errors = []
    with torch.no_grad():
        truth = torch.cat([x.double() @ w.double() for x, w in zip(left[:40].split(sizes), right, strict=True)])
        for seed in range(8):
            with Redrawing(seed):
                found = op(left, right, offs=ends)[:40]
                single = torch.cat([x @ w for x, w in zip(left[:40].split(sizes), right, strict=True)])
            assert found.dtype == dtype
            errors.append([float((x.double() - truth).norm() / truth.norm()) for x in (found, single)])
    assert len({e for e, _ in errors}) == 8
    grouped, single = np.mean(errors, axis=0)
    assert grouped == pytest.approx(single, rel=0.1)


@pytest.mark.parametrize("added", [0.0, 1e4, float("-inf")])
def test_what_is_added_to_a_product_is_no_part_of_its_sums(added: float) -> None:
    left, right = torch.randn(40, 64), torch.randn(64, 30)
    drawn = []
    for bias in (torch.zeros(30), torch.full((30,), added)):
        with Redrawing(3):
            drawn.append(torch.addmm(bias, left, right, beta=2) - 2 * bias)
    if math.isinf(added):
        assert drawn[1].isnan().all(), "minus infinity stays what it is"
    else:
        assert (drawn[1] - drawn[0]).abs().max() <= 2 * 2**-24 * max(2 * added, drawn[0].abs().max().item())


def test_a_row_that_stands_there_again_says_nothing_new() -> None:
    """A text of one token: where no rounding was drawn, all of its rows err alike."""
    row = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0))
    once = row.bfloat16().float()
    twice = ((row * 1.3).bfloat16().float() / 1.3).bfloat16().float()
    for rows, passes in ((1, True), (8, True)):
        truth = row.expand(rows, -1) * torch.linspace(1, 1 + 1e-5, rows)[:, None]
        rounded = [once.expand(rows, -1)] * (DRAWS + 1)
        found = judged(truth, rounded[0], twice.expand(rows, -1), drawn(truth, *rounded[1:]))
        assert (found.value <= found.allowed) is passes, rows
    many = torch.randn(60, FEATURES, generator=torch.Generator().manual_seed(1))
    rounded = [many.bfloat16().float()] * (DRAWS + 1)
    wrong = rounded[0].clone()
    wrong[:, 5] *= 1.02
    found = judged(many, rounded[0], wrong, drawn(many, *rounded[1:]))
    assert found.value > found.allowed


def test_a_tangent_may_be_made_of_exponentials() -> None:
    """Near zero that loses far more than a tangent's own rounding; of each copy the draws have one factor too."""
    x = (torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) * 0.1).expand(64, 500)
    true, e = x.double().tanh(), x.exp()
    with Redrawing(1):
        drawn = torch.tanh(x)
        half = torch.tanh(x.bfloat16())
    written, plain, found = ((y - true).norm() for y in ((e - 1 / e) / (e + 1 / e), torch.tanh(x), drawn))
    assert written > 4 * plain
    assert written < found < 4 * written
    factors = ((drawn - true) * true).sum(1) / (true * true).sum(1)
    assert 1e-7 < factors.abs().max() < 6e-7
    assert factors.min() < 0 < factors.max()
    assert torch.equal(half, torch.tanh(x.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_a_cache_of_bytes_may_lose_is_lost_between_cut_and_kept(dtype: torch.dtype) -> None:
    x = torch.randn(4096) * torch.logspace(-4, 1, 4096)
    found = Redrawing(1).stored_in(dtype)(x)
    nearest = x.to(dtype).float()
    assert (found.abs() <= x.abs()).all()
    assert (found.sign() == x.sign()).logical_or(found == 0).all()
    one_unit = torch.finfo(dtype).eps * x.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert ((x - found).abs() <= one_unit).all()
    assert (x - found).norm() > 1.5 * (x - nearest).norm()


def test_the_same_seed_draws_the_same() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(3, 64)
    with torch.no_grad():
        found = []
        for seed in (1, 1, 2):
            with Redrawing(seed):
                found.append(layer(x))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_is_not_rounded_is_left_alone() -> None:
    x, ids = torch.randn(5, 8), torch.tensor([1, 3])
    with Redrawing(0):
        assert torch.equal(nn.functional.embedding(ids, x), x[ids])
        assert torch.equal(torch.cat([x, x])[5:], x)


@given(st.floats(1e-12, 0.2), st.floats(3, 60))
def test_quantiles_fall_with_the_chance_and_with_degrees(chance: float, degrees: float) -> None:
    assert quantile(chance, degrees) >= quantile(chance * 2, degrees)
    assert quantile(chance, degrees) >= quantile(chance, degrees + 5) - 1e-9


def test_quantiles_are_students() -> None:
    """Against tables of Student's t, one-sided."""
    table = {(0.05, 10): 1.812, (0.001, 10): 4.144, (0.0005, 20): 3.850, (0.0005, 30): 3.646}
    for (chance, degrees), value in table.items():
        assert quantile(chance, degrees) == pytest.approx(value, rel=0.01)


def test_each_chance_adds_up_to_that_of_a_run() -> None:
    assert each_chance(1000) * 8 * 1000 == pytest.approx(1e-4)


def test_guards_know_the_sign_of_nothing() -> None:
    truth, twin, candidate, *copies = sides(6)
    draws = drawn(truth, *copies)
    meter = SpreadMeter()
    meter.update(truth, twin, candidate)
    found = {g.metric: g for g in drawn_guards(meter.result(), draws, least=0.0, chance=LUCK)}
    assert len(found) == 8
    assert all(np.isfinite(g.value) and g.floor > 0 and g.chance >= 1 for g in found.values())
