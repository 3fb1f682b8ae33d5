"""Edits of a module's code: each can be planted and is found again, none leaves a trace, and what fails is no cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

from paritykit.diagnose.edits.edit import Edit
from paritykit.diagnose.edits.rerun import Rerun
from paritykit.diagnose.edits.search import Explained, Search, edits_of
from paritykit.diagnose.edits.sites import Editing, Watching
from paritykit.diagnose.trial import Bar
from paritykit.errors import ParityError
from tests.scenes import TOKENS, numbers, scene_of

SIZE, POINT = 16, "mixer"


class Norm(nn.Module):
    """With a weight and an epsilon, as most models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + numbers(SIZE, seed=1) / 4), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Mixer(nn.Module):
    """Two norms, an activation, a residual, a scale, a cap and a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Norm(), Norm()
        self.two.weight = nn.Parameter(1 + numbers(SIZE, seed=2) / 4)
        self.up = nn.Linear(SIZE, SIZE)
        self.scale, self.turned = 0.3, False

    def forward(self, x: torch.Tensor, *, positions: torch.Tensor) -> tuple[torch.Tensor, None]:
        left, right = self.one(x), self.two(x) + positions[..., None] / 40
        inner = functional.silu(self.up(left)) * self.scale
        inner.clamp_(-0.4, 0.4)
        if self.turned:
            inner = inner.flip(-1)
        return torch.cat((inner, right), -1) + torch.cat((x, -x), -1), None


class Model(nn.Module):
    """Looks tokens up and mixes them."""

    device = torch.device("cpu")

    def __init__(self, *, times: int = 1) -> None:
        super().__init__()
        self.embed, self.mixer, self.times = nn.Embedding(TOKENS, SIZE), Mixer(), times
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in (*self.embed.parameters(), *self.mixer.up.parameters()):
                nn.init.normal_(parameter)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        del use_cache
        for _ in range(self.times):
            found = self.mixer(self.embed(input_ids), positions=torch.arange(input_ids.shape[1])[None])[0]
        return CausalLMOutput(logits=found)


@pytest.fixture
def model() -> Iterator[Model]:
    with torch.no_grad():
        yield Model()


def rerun_of(model: Model) -> Rerun:
    return Rerun(model, model.mixer, {"a": range(TOKENS)})


def searched(
    folder: Path, model: Model, theirs: torch.Tensor, *, budget: float = 60.0
) -> tuple[Search, list[Explained]]:
    """The best edits for what a candidate gave, with rounding of its own."""
    rerun = rerun_of(model)
    ours = rerun.rows("a")
    theirs = theirs + 1e-7 * theirs.norm(dim=1, keepdim=True) * numbers(*theirs.shape, seed=5) / math.sqrt(2 * SIZE)
    scene = scene_of(folder, POINT, {POINT: ours}, {POINT: theirs}, floor=1e-7)
    search = Search(rerun, Bar(scene), ["a"], budget=budget)
    assert search.reproduces()
    return search, search.best(edits_of(rerun, model.mixer, "a"))


def every_edit(model: Model) -> list[Edit]:
    return list(edits_of(rerun_of(model), model.mixer, "a"))


def state_of(model: nn.Module) -> Mapping[str, Any]:
    settings = {f"{n}.{k}": v for n, m in model.named_modules() for k, v in vars(m).items() if not k.startswith("_")}
    return settings | {n: (p.data_ptr(), p.sum().item()) for n, p in model.named_parameters()}


PLANTED = {
    "one left out": lambda m: setattr(m, "one", nn.Identity()),
    "one and two exchanged": lambda m: m.__dict__["_modules"].update(one=m.two, two=m.one),
    "clamp_ left out": lambda m: setattr(torch.Tensor, "clamp_", lambda x, *_: x),
    "scale 0.6": lambda m: setattr(m, "scale", 0.6),
    "turned True": lambda m: setattr(m, "turned", True),
    "up.bias zero": lambda m: m.up.bias.zero_(),
    "one taken from two.weight": lambda m: m.two.weight.sub_(1),
    "the halves of up.weight exchanged": lambda m: setattr(
        m.up, "weight", nn.Parameter(m.up.weight.roll(SIZE // 2, 0))
    ),
    "gelu's tanh form in place of silu": lambda m: setattr(
        functional, "silu", lambda x: functional.gelu(x, approximate="tanh")
    ),
}


@pytest.mark.parametrize("label", PLANTED)
def test_what_was_planted_is_named(label: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Model()
    with monkeypatch.context() as patch:
        for target, name in ((torch.Tensor, "clamp_"), (functional, "silu")):
            patch.setattr(target, name, getattr(target, name))  # put back at the end
        PLANTED[label](wrong.mixer)
        theirs = rerun_of(wrong).rows("a")
    search, (first, *others) = searched(tmp_path, model, theirs)
    assert first.edit.label.startswith(label)
    assert first.fits
    assert first.left < 1e-3
    assert not any(o.fits for o in others)
    assert search.tried > 50


def test_where_it_is_written_is_said(model: Model) -> None:
    clamp = next(e for e in every_edit(model) if e.label == "clamp_ left out")
    assert clamp.code == "inner.clamp_(-0.4, 0.4)"
    assert clamp.where.startswith("test_edits.py:")
    norm = next(e for e in every_edit(model) if e.label == "one left out")
    assert norm.code == "left, right = self.one(x), self.two(x) + positions[..., None] / 40"
    scale = next(e for e in every_edit(model) if e.label.startswith("scale "))
    assert scale.code == "inner = functional.silu(self.up(left)) * self.scale"


def test_no_edit_leaves_a_trace(model: Model) -> None:
    rerun, before = rerun_of(model), state_of(model)
    plain, other = rerun.rows("a"), 0
    for edit in edits_of(rerun, model.mixer, "a"):
        with suppress(RuntimeError, ValueError, TypeError, ParityError):
            other += not torch.equal(rerun.rows("a", edit.enter()), plain)
        assert state_of(model) == before, edit.label
    assert torch.equal(rerun.rows("a"), plain)
    assert other > 50


def test_what_no_edit_gives_has_no_cause(model: Model, tmp_path: Path) -> None:
    """Another matrix in the place of one: something is always nearest."""
    wrong = Model()
    wrong.mixer.up.weight.copy_(numbers(SIZE, SIZE, seed=9))
    _, found = searched(tmp_path, model, rerun_of(wrong).rows("a"))
    assert found
    assert not any(e.fits for e in found)


def test_a_half_of_the_positions_is_not_enough(model: Model, tmp_path: Path) -> None:
    """An edit that explains the positions it is chosen by, and not the others, is none."""
    wrong = Model()
    wrong.mixer.one = nn.Identity()  # type: ignore[assignment]
    theirs = rerun_of(wrong).rows("a")
    theirs[1::2] = numbers(*theirs[1::2].shape, seed=3) * 9
    _, found = searched(tmp_path, model, theirs)
    assert not any(e.fits for e in found)


def test_a_search_ends_in_time(model: Model, tmp_path: Path) -> None:
    search, found = searched(tmp_path, model, rerun_of(Model()).rows("a") * 2, budget=0.0)
    assert (search.tried, found) == (0, [])


def test_a_module_that_is_called_twice_is_not_run_again() -> None:
    with torch.no_grad(), pytest.raises(ParityError, match="called 2 times"):
        rerun_of(Model(times=2))


def test_a_call_is_edited_at_its_own_place_only(model: Model) -> None:
    """The file has two ``cat`` on one line."""
    rerun = rerun_of(model)
    with Watching() as watching:
        rerun.rows("a")
    cats = [c.place for c in watching.calls if c.place.name == "cat"]
    assert len(set(cats)) == 2
    assert len({(c.file, c.line) for c in cats}) == 1
    with Editing({cats[0]: lambda func, args, kwargs: func(*args, **kwargs) * 0}) as editing:
        first = rerun.rows("a")
    assert editing.done == 1
    assert torch.equal(first[:, :SIZE], model.embed.weight)
