"""What the reference's code makes of a parameter alone is read from it, and an engine may store it so."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from paritykit.engines.derived import derived_functions
from paritykit.ledger.numbers import changed
from paritykit.ledger.subject import ReferenceLayout, WeightSubject
from paritykit.provenance.weightmap import RankLedger
from tests.weights import Toy, subject


class Decay(nn.Module):
    """Uses its parameters in several ways, only some of them of one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.ones(4))
        self.rate = nn.Parameter(torch.ones(4))
        self.plain = nn.Parameter(torch.ones(4))
        self.cast = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decay = -torch.exp(self.log.float())
        return x * decay + torch.sigmoid(self.rate) + self.plain * x + self.cast.to(x.dtype) + torch.exp(x * self.plain)


def test_functions_of_one_parameter_alone() -> None:
    assert derived_functions(nn.Sequential(Decay(), nn.Linear(2, 2))) == {
        "0.log": ["-exp(x)"],
        "0.rate": ["sigmoid(x)"],
    }


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_h1"])
def test_the_decay_of_state_space_models(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=2))
    found = derived_functions(model)
    logs = [n for n, _ in model.named_parameters() if n.endswith("A_log")]
    assert logs
    assert all(found[n] == ["-exp(x)"] for n in logs)
    assert not [n for n in found if n.endswith(("norm.weight", "proj.weight"))]


@pytest.mark.parametrize(("stored", "told"), [("-exp(x)", 0), ("exp(x)", 1), ("+1", 1), ("*2", 1)])
def test_only_the_references_own_function_is_no_fault(stored: str, told: int) -> None:
    whole = subject(Toy())
    (ledger,) = whole.ledgers
    name = next(iter(whole.by_tensor))
    landings = [msgspec.structs.replace(x, change=stored) if x.tensor == name else x for x in ledger.found.landings]
    altered = RankLedger(found=msgspec.structs.replace(ledger.found, landings=landings))
    layout = msgspec.structs.replace(whole.expected.reference or ReferenceLayout(), derived={name: ["-exp(x)"]})
    expected = msgspec.structs.replace(whole.expected, reference=layout)
    assert len(list(changed(WeightSubject([altered], expected)))) == told
