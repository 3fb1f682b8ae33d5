"""A code is read back exactly through any dtype, and what was changed on the way is nobody's address."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.provenance.codes import BITS, WIDTH, Coding, coding_for
from paritykit.provenance.sources import FIRST, list_sources, probe_values

DTYPES = list(BITS)
MANY = torch.arange(1, 20_001, dtype=torch.int64)
Digits = list[torch.Tensor]


def digits_of(coding: Coding, addresses: torch.Tensor) -> Digits:
    return [coding.digit(addresses, n) for n in range(coding.passes)]


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
@settings(deadline=None, max_examples=200)
def test_digits_survive_their_dtype_and_spell_the_address(dtype: torch.dtype, addresses: list[int]) -> None:
    coding, wanted = coding_for({dtype}), torch.tensor(addresses)
    held = [d.to(dtype) for d in digits_of(coding, wanted)]
    assert torch.equal(coding.join([h.to(torch.float64).to(torch.int64) for h in held]), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digit_plus_one_is_exact_and_no_digit_is_poison(dtype: torch.dtype) -> None:
    digits = torch.arange(1 << coding_for({dtype}).bits)
    assert torch.equal((digits + 1).to(dtype).to(torch.int64), digits + 1)
    if not dtype.is_floating_point:
        assert int(digits.max()) < torch.iinfo(dtype).max


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [
    lambda d: [x + 1 for x in d],
    lambda d: [x - 1 for x in d],
    lambda d: [2 * x for x in d],
    lambda d: [3 * x for x in d],
    lambda d: [torch.where(x % 2 == 0, x // 2, -1) for x in d],
    lambda d: [-x for x in d],
    lambda d: [x + y for x, y in zip(d, [x.flip(0) for x in d], strict=True)],
], ids=["+1", "-1", "*2", "*3", "*0.5", "negated", "sum"])  # fmt: skip
def test_what_was_changed_is_nobodys_address(dtype: torch.dtype, change: Callable[[Digits], Digits]) -> None:
    coding = coding_for({dtype})
    read = coding.join(change(digits_of(coding, MANY)))
    assert not ((read >= FIRST) & (read <= MANY[-1])).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_are_nobodys(dtype: torch.dtype) -> None:
    coding = coding_for({dtype})
    for constant in range(1 << min(coding.bits, 6)):
        (read,) = coding.join([torch.tensor([constant])] * coding.passes).tolist()
        assert read > 2**26


@pytest.mark.parametrize("digit", [-1, 128, 2**40])
def test_what_is_no_digit_spells_nothing(digit: int) -> None:
    for place in range(7):
        digits = [torch.tensor([digit if n == place else 1]) for n in range(7)]
        assert coding_for({torch.bfloat16}).join(digits).tolist() == [-1]


def test_one_code_for_each_address() -> None:
    coding = Coding(bits=7, passes=2)
    low, high = digits_of(coding, torch.arange(1 << 14))
    assert sorted((low + (high << 7)).tolist()) == [*range(1 << 14)]


def test_the_narrowest_dtype_decides() -> None:
    assert coding_for({torch.float32, torch.bfloat16, torch.int64}).bits == 7
    assert coding_for({torch.float32, torch.complex64}).bits == 2
    assert coding_for(set()).bits == 22
    for dtype in DTYPES:
        assert WIDTH <= coding_for({dtype}).width < WIDTH + coding_for({dtype}).bits


def test_each_hand_over_has_addresses_of_its_own() -> None:
    shapes = [("a", (2, 3)), ("b", ()), ("a", (4,)), ("c", (0, 5)), ("d", (1,))]
    sources = list_sources((n, torch.zeros(s)) for n, s in shapes)
    assert [(s.name, s.copy, s.size) for s in sources] == [
        ("a", 0, 6),
        ("b", 0, 1),
        ("a", 1, 4),
        ("c", 0, 0),
        ("d", 0, 1),
    ]
    assert sources[0].start == FIRST
    assert all(two.start > one.start + one.size for one, two in pairwise(sources))


def test_probes_are_the_same_again_and_lie_on_no_line_with_each_other() -> None:
    one, other = list_sources([("a", torch.zeros(8, 50)), ("b", torch.zeros(8, 50))])
    assert torch.equal(probe_values(one), probe_values(one))
    assert float(torch.stack([probe_values(one), probe_values(other)]).min()) >= 0.25
    assert float(torch.stack([probe_values(one), probe_values(other)]).max()) <= 1.75
    assert abs(float(torch.corrcoef(torch.stack([probe_values(s).reshape(-1) for s in (one, other)]))[0, 1])) < 0.2
