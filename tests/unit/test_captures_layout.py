"""From a module's tensor to rows of tokens: padding cut away, ambiguous shapes read as their point always was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.captures.layout import DenseLayout

FEATURES = 5


def labelled(batch: int, length: int) -> torch.Tensor:
    """``[batch, length, features]``, every token with a number of its own."""
    numbers = torch.arange(batch * length, dtype=torch.float32).reshape(batch, length, 1)
    return numbers.expand(batch, length, FEATURES).contiguous()


def layout(batch: int, length: int, keep: torch.Tensor | None = None) -> DenseLayout:
    found = DenseLayout()
    found.set(batch, length, keep=keep)
    return found


@given(st.integers(1, 4), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_padding_is_cut_in_every_shape(batch: int, length: int, data: st.DataObject) -> None:
    cells = batch * length
    kept = data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells).filter(any))
    keep = torch.tensor(kept).reshape(batch, length)
    found, tokens = layout(batch, length, keep), labelled(batch, length)
    heads = tokens[:, None].expand(batch, 7, length, FEATURES)
    wanted = [float(n) for n in range(cells) if kept[n]]
    for key, tensor in {"plain": tokens, "flat": tokens.flatten(0, 1), "two": tokens[..., 0], "heads": heads}.items():
        rows = found.rows(tensor, key)
        assert rows is not None
        assert len(rows) == len(wanted)
        assert rows.flatten(1)[:, 0].tolist() == wanted, key


def test_heads_before_tokens() -> None:
    rows = layout(2, 3).rows(torch.arange(2 * 4 * 3 * 5.0).reshape(2, 4, 3, 5), "k")
    assert rows is not None
    assert rows.shape == (6, 4, 5)
    assert rows[4, 2].tolist() == torch.arange(2 * 4 * 3 * 5.0).reshape(2, 4, 3, 5)[1, 2, 1].tolist()


def test_an_ambiguous_shape_is_read_as_before() -> None:
    """As many tokens as heads: what the point was in another pass decides."""
    square = torch.arange(3 * 3 * 2.0).reshape(1, 3, 3, 2)
    known, fresh = layout(1, 5), layout(1, 3)
    assert known.rows(torch.zeros(1, 3, 5, 2), "heads first") is not None
    assert known.rows(torch.zeros(1, 5, 3, 2), "tokens first") is not None
    known.set(1, 3)
    first, second, unknown = (
        f.rows(square, k) for f, k in ((known, "heads first"), (known, "tokens first"), (fresh, "heads first"))
    )
    assert first is not None
    assert second is not None
    assert unknown is not None
    assert torch.equal(first, square[0].transpose(0, 1))
    assert torch.equal(second, square[0])
    assert torch.equal(unknown, square[0])


def test_one_row_for_all_sequences_is_repeated() -> None:
    positions = torch.arange(3.0).reshape(1, 3, 1).expand(1, 3, 4)
    rows = layout(2, 3).rows(positions, "positions")
    assert rows is not None
    assert rows[:, 0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("shape", [(), (6,), (2,), (3, 5), (4, 3, 5), (2, 4, 5), (1, 4, 3), (2, 4, 5, 3)], ids=str)
def test_no_token_axis(shape: tuple[int, ...]) -> None:
    assert layout(2, 3).rows(torch.zeros(shape), "k") is None


def test_the_next_forward_forgets_the_padding() -> None:
    found = layout(2, 3, torch.tensor([[False, True, True], [True, True, True]]))
    found.set(2, 1)
    rows = found.rows(labelled(2, 1), "k")
    assert rows is not None
    assert len(rows) == 2


def test_rows_without_padding_are_a_view() -> None:
    tokens = labelled(2, 3)
    rows = layout(2, 3, torch.ones(2, 3, dtype=torch.bool)).rows(tokens, "k")
    assert rows is not None
    assert rows.data_ptr() == tokens.data_ptr()
