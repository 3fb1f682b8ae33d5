"""Following a loader gives the map that its own parameters prove, whatever it does on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paritykit.engines.nano import weights as nano_weights
from paritykit.engines.nano.engine import NanoEngine
from paritykit.provenance.follow import Follower
from paritykit.provenance.followed import Samples, followed_map
from paritykit.provenance.moves import scatter
from paritykit.provenance.trace import named_tensors, trace
from paritykit.provenance.watch import watch_load
from paritykit.provenance.weightmap import RankLedger, WeightMap
from paritykit.testing import tiny_model
from tests.weights import random_tensor

Load = Callable[[nn.Module, dict[str, torch.Tensor]], None]


class Model(nn.Module):
    """Room for two tensors of six by four, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(12, 4))
        self.register_buffer("scale", torch.ones(()))


def tensors() -> dict[str, torch.Tensor]:
    return {"a": random_tensor(6, 4), "b": random_tensor(6, 4, seed=1), "s": torch.tensor(3.5)}


def followed(load: Load, model: nn.Module | None = None) -> tuple[WeightMap, nn.Module]:
    model, given_tensors = model or Model(), tensors()
    before = Samples(named_tensors(model))
    with torch.no_grad(), Follower(named_tensors(model).values()) as follower:
        load(model, {n: follower.give(n, t) for n, t in given_tensors.items()})
    assert not follower.error
    return followed_map(follower, named_tensors(model), rank=0, before=before), model


def parameter(model: nn.Module) -> torch.Tensor:
    found = named_tensors(model)["weight"].detach()
    assert found.is_floating_point()
    return found


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "cloned": lambda x: x.clone(),
    "turned": lambda x: x.t().contiguous().t(),
    "flipped": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(2, 0),
    "rows chosen": lambda x: x[torch.tensor([3, 1, 5, 0, 2, 4])],
    "interleaved": lambda x: x.view(2, 3, 4).transpose(0, 1).reshape(6, 4),
    "halves swapped": lambda x: torch.cat([x[3:], x[:3]]),
    "stacked": lambda x: torch.stack([x[::2], x[1::2]]).flatten(0, 1),
    "offset": lambda x: x + 1,
    "negative exponential": lambda x: -torch.exp(x),
    "scaled in place": lambda x: x.clone().mul_(2),
    "squared and rooted": lambda x: (x * 0.5).float(),
}


@given(st.lists(st.sampled_from(sorted(WAYS)), max_size=3), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_what_is_followed_is_what_arrived(ways: list[str], rows: int) -> None:
    """Carrying the map out on the tensors gives the parameter itself; only two changes in a row have no name."""

    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        for number, name in enumerate("ab"):
            value = given_tensors[name]
            for way in ways:
                value = WAYS[way](value)
            start = 6 * number + rows * number
            stop = min(start + 6, 12)
            parameter(model)[start:stop].copy_(value[: stop - start])

    found, model = followed(load)
    made = scatter(found, tensors())["weight"]
    known = ~made.isnan()
    assert torch.allclose(made[known].float(), parameter(model)[known], rtol=1e-6)
    kinds = {g.kind for g in found.gaps if g.parameter == "weight"}
    changes = sum(way in {"offset", "negative exponential", "scaled in place", "squared and rooted"} for way in ways)
    assert "unfollowed" not in kinds or changes > 1
    assert bool(rows) == ("unwritten" in kinds)


def copied(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
    parameter(model)[:6].copy_(given_tensors["a"])
    parameter(model)[6:].copy_(given_tensors["b"])


def test_a_function_of_what_was_loaded_before() -> None:
    """As loaders do that put a tensor in first and then make what they need of it."""

    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        copied(model, given_tensors)
        parameter(model).copy_(-torch.exp(parameter(model).float()))

    found, _ = followed(load)
    assert [(x.tensor, x.change) for x in found.landings] == [("a", "-exp(x)"), ("b", "-exp(x)")]


def test_a_parameter_that_becomes_the_tensor() -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        assert isinstance(model.weight, nn.Parameter)
        model.weight.data = given_tensors["a"]

    found, _ = followed(load)
    assert [(x.tensor, x.parameter, x.change) for x in found.landings] == [("a", "weight", "")]


def test_a_number_that_goes_through_python() -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        named_tensors(model)["scale"].fill_(given_tensors["s"].item())

    found, _ = followed(load)
    assert [(x.tensor, x.parameter) for x in found.landings] == [("s", "scale")]


def test_what_is_written_last_counts() -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        copied(model, given_tensors)
        parameter(model)[4:8].copy_(given_tensors["a"][:4])
        parameter(model)[11:].zero_()

    found, model = followed(load)
    made = scatter(found, tensors())["weight"]
    assert torch.equal(made.float(), parameter(model))
    assert [(g.kind, g.value) for g in found.gaps if g.parameter == "weight"] == [("constant", 0.0)]


def test_two_tensors_in_one_are_lost_and_not_wrong() -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        parameter(model)[:6].copy_(given_tensors["a"] * given_tensors["b"])

    found, _ = followed(load)
    gaps = [g for g in found.gaps if g.parameter == "weight"]
    assert [(g.kind, g.tensor) for g in gaps] == [("unfollowed", "a"), ("unfollowed", "b"), ("unwritten", "")]
    assert not found.landings


def test_what_no_operation_wrote_is_seen_by_its_numbers() -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        parameter(model).numpy()[:6] = given_tensors["a"].numpy()

    found, _ = followed(load)
    assert [(g.kind, g.tensor) for g in found.gaps if g.parameter == "weight"] == [("unfollowed", "")]


def ledger(load: Load, *, large: int) -> RankLedger:
    model = Model()
    with torch.no_grad():
        return watch_load(model, weights=tensors().items, load=lambda w: load(model, dict(w)), large=large)


@pytest.mark.parametrize("large", [0, 1 << 20])
def test_traced_and_followed_are_one(large: int) -> None:
    found = ledger(copied, large=large)
    assert not found.error
    assert [(x.tensor, x.target[0].start) for x in found.found.landings] == [("a", 0), ("b", 6)]
    assert [a.differing for a in found.arrived] == [0, 0]


def test_a_value_that_changes_unseen_is_found_by_the_numbers() -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        copied(model, given_tensors)
        parameter(model).numpy()[2, 1] = 9.0

    found = ledger(load, large=0)
    assert [(a.tensor, a.differing, a.index) for a in found.arrived] == [("a", 1, (2, 1)), ("b", 0, ())]


def test_a_loader_that_refuses_made_up_numbers_is_followed() -> None:
    """Tracing ends in its error; the real weights go through and are followed."""

    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        if float(given_tensors["s"]) != 3.5:
            raise ValueError("not the scale that was trained")
        copied(model, given_tensors)

    found = ledger(load, large=1 << 20)
    assert (found.error, [x.tensor for x in found.found.landings]) == ("", ["a", "b"])


def test_an_error_of_the_loader_goes_through() -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        raise KeyError("layers.9.weight")

    with pytest.raises(KeyError, match=r"layers\.9"):
        ledger(load, large=0)


@pytest.mark.parametrize("way", WAYS)
def test_following_agrees_with_tracing(way: str) -> None:
    def load(model: nn.Module, given_tensors: dict[str, torch.Tensor]) -> None:
        parameter(model)[:6].copy_(WAYS[way](given_tensors["a"]))
        parameter(model)[6:].copy_(given_tensors["b"])

    model = Model()
    with torch.no_grad():
        traced = trace(
            partial(named_tensors, model), weights=tensors().items, load=lambda weights: load(model, dict(weights))
        )
    made = [scatter(found, tensors())["weight"] for found in (followed(load)[0], traced)]
    assert torch.equal(*made)


@pytest.mark.parametrize("family", ["qwen2", "llama_tied", "gemma3", "qwen3_moe"])
def test_an_engine_is_followed_as_it_is_traced(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tiny_model(family))
    traced = ledger_of(folder)
    monkeypatch.setattr(nano_weights, "watch_load", partial(watch_load, large=0))
    found = ledger_of(folder)
    assert set(map(repr, found.found.landings)) == set(map(repr, traced.found.landings))
    assert set(map(repr, found.found.gaps)) == set(map(repr, traced.found.gaps))
    assert len(found.arrived) == len(found.found.landings)
    assert not any(a.differing for a in found.arrived)


def ledger_of(folder: str) -> RankLedger:
    engine = NanoEngine(folder, dtype="float32")
    engine.open()
    try:
        return engine.ledger()[0]
    finally:
        engine.close()
