"""The hooks: every kind of output, every way to share and reuse modules, and nothing left behind."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from paritykit.captures.layout import DenseLayout
from paritykit.captures.manifest import Manifest, Segment
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Recorder, Seen, Selection
from paritykit.captures.writer import CaptureFolder, PartWriter
from paritykit.case import Case
from paritykit.engines.reading import FirstTensor
from tests.made import side

TOKENS = 3


@contextmanager
def recording(folder: Path, model: nn.Module, **options: Any) -> Iterator[tuple[Recorder, list[Capture]]]:
    """A recorder in a pass over one case of ``TOKENS`` tokens; the capture is in the list afterwards."""
    found: list[Capture] = []
    selection = Selection(options.pop("points", None))
    given: dict[str, Any] = {"reading": FirstTensor(), "selection": selection, "alias": True} | options
    with CaptureFolder(folder) as target, PartWriter(target.path) as part:
        layout = DenseLayout()
        layout.set(1, TOKENS)
        with Recorder(model, part, **given) as recorder:
            recorder.begin([Segment(0, 0, TOKENS)], layout.rows)
            yield recorder, found
            recorder.end()
        manifest = Manifest(side=side(), cases=[Case(id="a", tokens=(1,) * TOKENS)])
        found.append(Capture.open(target.commit(manifest, [part.finish()])))


def record(folder: Path, model: nn.Module, x: torch.Tensor, **options: Any) -> Capture:
    with recording(folder, model, **options) as (_, found), torch.no_grad():
        model(x)
    return found[0]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def rows(capture: Capture, key: str) -> torch.Tensor:
    return capture.rows(key, "a")


def x() -> torch.Tensor:
    return torch.randn(1, TOKENS, 4)


class Doubled(nn.Module):
    """Gives twice its input, wrapped."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, value: torch.Tensor) -> Any:
        return self.wrap(value * 2)


@dataclass
class Plain:
    mask: torch.Tensor | None
    hidden: torch.Tensor


Pair = namedtuple("Pair", ["ids", "hidden"])
WRAPS = {
    "tensor": lambda t: t,
    "tuple": lambda t: (t, None),
    "list": lambda t: [None, t],
    "namedtuple": lambda t: Pair(torch.zeros(3, dtype=torch.long), t),
    "dict": lambda t: {"ids": torch.zeros(3, dtype=torch.long), "hidden": t},
    "nested": lambda t: ((None, {"inner": [t]}), t + 1),
    "model output": lambda t: BaseModelOutput(last_hidden_state=t, hidden_states=(t + 1,)),
    "dataclass": lambda t: Plain(None, t),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_any_form_of_output(tmp_path: Path, wrap: Any) -> None:
    value = x()
    capture = record(tmp_path / "c", nn.Sequential(Doubled(wrap)), value)
    assert torch.equal(rows(capture, "0"), value[0] * 2)
    assert torch.equal(rows(capture, "0#input"), value[0])


@pytest.mark.parametrize("output", [None, 3, "text", torch.zeros(3, dtype=torch.long), (), {}, [None]], ids=repr)
def test_outputs_without_a_floating_tensor(tmp_path: Path, output: Any) -> None:
    class Odd(nn.Module):
        def forward(self, value: torch.Tensor) -> Any:
            return output

    assert list(record(tmp_path / "c", nn.Sequential(Odd()), x())) == ["0#input"]


def test_a_tensor_without_token_axis_is_left_out_with_the_reason(tmp_path: Path) -> None:
    capture = record(tmp_path / "c", nn.Sequential(Doubled(lambda t: t.sum())), x())
    assert list(capture) == ["0#input"]
    assert [(d.point, d.reason) for d in capture.manifest.dropped] == [("0", "its shape [] has no token axis")]


def test_a_module_called_twice_is_recorded_twice(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, value: torch.Tensor) -> Any:
            return self.inner(self.inner(value))

    value, model = x(), nn.Sequential(Twice())
    capture = record(tmp_path / "c", model, value)
    inner: Any = model[0].inner
    with torch.no_grad():
        once, twice = inner(value), inner(inner(value))
    assert torch.equal(rows(capture, "0.inner"), once[0])
    assert torch.equal(rows(capture, "0.inner@1"), twice[0])
    assert capture.point("0.inner@1#input").source == "0.inner"
    assert capture.point("0").source == "0.inner@1"


def test_one_object_under_two_names_is_recorded_under_both(tmp_path: Path) -> None:
    shared = Doubled(lambda t: t)
    value = x()
    model = nn.Sequential(shared, nn.Identity(), shared)
    capture = record(tmp_path / "c", model, value)
    assert torch.equal(rows(capture, "0"), value[0] * 2)
    assert torch.equal(rows(capture, "2"), value[0] * 4)
    assert not any("@" in key for key in capture)


def test_calls_are_counted_anew_in_every_pass(tmp_path: Path) -> None:
    model = nn.Sequential(Doubled(lambda t: t))
    layout = DenseLayout()
    layout.set(1, TOKENS)
    with PartWriter(tmp_path) as part:
        with Recorder(model, part, reading=FirstTensor(), selection=Selection(), alias=True) as recorder:
            for step in range(3):
                recorder.begin([Segment(0, step * TOKENS, TOKENS)], layout.rows)
                model(x())
                recorder.end()
                model(x())
        found = part.finish()
    assert {p.key: len(p.pieces) for p in found.points} == {"0": 3, "0#input": 3}


class InPlace(nn.Module):
    """Overwrites what it is given."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.mul_(100.0)


@pytest.mark.parametrize("alias", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_later_write_in_place_changes_nothing(tmp_path: Path, alias: bool, mode: Any) -> None:
    """The doubled tensor becomes a hundred times larger after it was recorded, and is recorded again as such."""
    value = x()
    model = nn.Sequential(Doubled(lambda t: t), InPlace(), nn.Identity())
    with recording(tmp_path / "c", model, alias=alias) as (_, found), mode():
        model(value.clone())
    capture = found[0]
    doubled = value[0] * 2
    assert torch.equal(rows(capture, "0"), doubled)
    assert torch.equal(rows(capture, "1#input"), doubled)
    assert torch.equal(rows(capture, "1"), doubled * 100)
    assert torch.equal(rows(capture, "2"), doubled * 100)
    assert capture.point("1").source == ""
    assert (capture.point("1#input").source == "0") == (alias and mode is torch.no_grad)


def test_a_write_through_a_view_defeats_aliasing(tmp_path: Path) -> None:
    class Rotated(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            value[..., :2].neg_()
            return value

    value = x()
    capture = record(tmp_path / "c", nn.Sequential(nn.Identity(), Rotated()), value.clone())
    assert torch.equal(rows(capture, "0"), value[0])
    assert capture.point("1").source == ""
    assert torch.equal(rows(capture, "1")[:, :2], -value[0, :, :2])


@pytest.mark.parametrize("summed", [True, False])
def test_a_write_that_torch_does_not_count_is_seen_in_the_bytes(tmp_path: Path, summed: bool) -> None:
    """A collective or a kernel of one's own writes into a tensor without a new version: as writing through ``data``."""

    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4, bias=False)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.part(value)
            before = out._version
            if summed:
                out.data.mul_(2)
            assert out._version == before
            return out

    first, value = Reduced(), x()
    capture = record(tmp_path / "c", nn.Sequential(first, nn.Identity()), value)
    part = first.part(value)[0].detach()
    assert torch.equal(rows(capture, "0.part"), part)
    assert torch.equal(rows(capture, "0"), part * (2 if summed else 1))
    assert torch.equal(rows(capture, "1#input"), part * (2 if summed else 1))
    assert capture.point("0").source == ("" if summed else "0.part")
    assert capture.point("1#input").source == ("0" if summed else "0.part")


def test_an_alias_is_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Identity())
    capture = record(tmp_path / "c", model, x())
    assert {k: capture.point(k).source for k in capture} == {
        "0.0#input": "",
        "0.0": "",
        "0": "0.0",
        "1#input": "0.0",
        "1": "0.0",
    }
    assert len({p.name for k in capture for p in capture.point(k).pieces}) == 2
    assert torch.equal(rows(capture, "1"), rows(capture, "0.0"))


def test_a_freed_tensor_is_no_alias(tmp_path: Path) -> None:
    """Another tensor may get the address and even the identity number of one that is gone."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(Doubled(lambda t: t) for _ in range(40))

        def forward(self, value: torch.Tensor) -> None:
            for number, step in enumerate(self.steps):
                step(value + number)

    value, model = x(), nn.Sequential(Chain())
    capture = record(tmp_path / "c", model, value)
    for number in range(40):
        assert torch.equal(rows(capture, f"0.steps.{number}"), (value[0] + number) * 2)


def test_hooks_are_removed_after_a_pass_and_after_a_failure(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

    model = nn.Sequential(nn.Linear(4, 4), Broken())
    with pytest.raises(ZeroDivisionError):
        record(tmp_path / "c", model, x())
    assert hooks(model) == 0
    assert list(tmp_path.iterdir()) == []
    record(tmp_path / "c", model[:1], x())
    assert hooks(model) == 0


def test_the_users_own_hooks_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: None)
    record(tmp_path / "c", model, x())
    assert hooks(model) == 1


class Failing(FirstTensor):
    """A reading with a defect."""

    def outputs(self, module: nn.Module, output: Any) -> Iterator[Seen]:
        if isinstance(module, nn.ReLU):
            raise RuntimeError("cannot read this")
        yield from super().outputs(module, output)


def test_a_failure_in_a_hook_ends_the_recording(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity())
    with recording(tmp_path / "c", model, reading=Failing(), keep_error=True) as (recorder, found):
        model(x())
        assert str(recorder.error) == "cannot read this"
        assert not recorder.active
        recorder.begin([Segment(0, 0, TOKENS)], lambda t, _: t)
        assert not recorder.active
    assert not any(key.startswith("2") for key in found[0])


def test_a_failure_in_a_hook_is_raised_without_keep_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot read this"):
        record(tmp_path / "c", nn.Sequential(nn.ReLU()), x(), reading=Failing())


@pytest.mark.parametrize(("patterns", "kept"), [
    (None, {"0", "0#input", "1.0", "1.0#input", "1"}),
    ((), set()),
    (["1.*"], {"1.0", "1.0#input"}),
    (["*#input"], {"0#input", "1.0#input"}),
    (["0"], {"0"}),
    (["1", "0#input"], {"1", "0#input"}),
    (["nothing"], set()),
    (["[01]"], {"0", "1"}),
])  # fmt: skip
def test_selection(tmp_path: Path, patterns: list[str] | None, kept: set[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    value = x()
    capture = record(tmp_path / "c", model, value, points=patterns)
    assert set(capture) == kept
    if "1" in kept:
        with torch.no_grad():
            assert torch.equal(rows(capture, "1"), model(value)[0])


def test_an_empty_selection_puts_no_hooks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with recording(tmp_path / "c", model, points=()):
        assert hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_engines_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    capture = record(tmp_path / "c", nn.Sequential(nn.Linear(4, 4)).to(dtype), x().to(dtype))
    assert {capture.point(k).dtype for k in capture} == {str(dtype).removeprefix("torch.")}
    assert rows(capture, "0").dtype == dtype
