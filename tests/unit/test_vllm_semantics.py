"""vLLM's modules are read by what they do: on modules of every kind of behaviour, whatever their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paritykit.engines.vllm.semantics import VllmReading, adds_residual, is_norm, meaning_of

HIDDEN, RESIDUAL = torch.randn(3, 4), torch.randn(3, 4)


class Scale(nn.Module):
    """No norm's name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.how = how

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> Any:
        if other is None:
            return x * self.weight
        match self.how:
            case "adds":
                return (x + other) * self.weight, x + other
            case "adds in place":
                return other.add_(x) * self.weight, other
            case "hands through":
                return x * self.weight, other
            case "gates":
                return x * other.sigmoid()
        raise ValueError("not two")


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.scale = Scale(how)


WAYS = {"adds": True, "adds in place": True, "hands through": False, "gates": False, "refuses": False}


@pytest.mark.parametrize(("how", "adds"), WAYS.items())
@pytest.mark.parametrize("named", [False, True])
def test_whether_a_norm_adds_what_it_is_handed_is_tried(how: str, adds: bool, named: bool) -> None:
    module, hidden, residual = Scale(how), HIDDEN.clone(), RESIDUAL.clone()
    call = ((hidden,), {"other": residual}) if named else ((hidden, residual), {})
    assert is_norm(module)
    assert adds_residual(module, call) == adds
    assert torch.equal(hidden, HIDDEN)
    assert torch.equal(residual, RESIDUAL)


@pytest.mark.parametrize(("how", "adds"), WAYS.items())
def test_the_input_and_the_layer_follow_from_it(how: str, adds: bool) -> None:
    block, reading = Block(how), VllmReading()
    (seen,) = reading.inputs(block.scale, (HIDDEN, RESIDUAL), {})
    assert torch.equal(seen.tensor, HIDDEN + RESIDUAL if adds else HIDDEN)
    (given,) = reading.outputs(block, (HIDDEN, RESIDUAL))
    assert torch.equal(given.tensor, HIDDEN + RESIDUAL if adds else HIDDEN)
    new = torch.randn(3, 4)
    (first, second), _ = reading.put_input(block.scale, ((HIDDEN, RESIDUAL), {}), seen, new)
    assert torch.equal(first + second if adds else first, new)
    assert adds or second is RESIDUAL


def test_the_same_tensor_twice_is_no_obstacle() -> None:
    assert adds_residual(Scale("adds"), ((HIDDEN, HIDDEN), {}))
    assert not adds_residual(Scale("hands through"), ((HIDDEN, HIDDEN), {}))


def test_a_bias_that_is_left_to_others_belongs_to_the_output() -> None:
    module, bias = nn.Linear(4, 4), torch.randn(4)
    found = meaning_of(module, (HIDDEN, bias))
    assert found is not None
    torch.testing.assert_close(found, HIDDEN + bias)
    assert meaning_of(module, (HIDDEN, None)) is HIDDEN
    reading, new = VllmReading(), torch.randn(3, 4)
    (seen,) = reading.outputs(module, (HIDDEN, bias))
    first, second = reading.put_output(module, (HIDDEN, bias), seen, new)
    assert second is bias
    torch.testing.assert_close(first + second, new)
