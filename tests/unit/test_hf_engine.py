"""The reference engine on tiny models: padding never leaks, decoding equals prefill, forced tokens are followed."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.captures.reader import Capture, let_go
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.engines.hf import HFEngine
from paritykit.engines.truth import round_weights
from paritykit.errors import EngineError, UnknownNameError, UsageError
from paritykit.testing import tiny_model

FAMILIES = ["qwen2", "gemma2", "gpt2"]
TOKENS = tuple(range(3, 3 + 17 * 23, 23)) * 2
RAGGED = [
    Case(id="one", tokens=(498,), new_tokens=0),
    Case(id="long", tokens=TOKENS, new_tokens=4),
    Case(id="some", tokens=TOKENS[5:12], new_tokens=2),
]
Run = Callable[..., Capture]


class Engines:
    """Engines that stay open; every run gets a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = itertools.count()
        self._open: dict[Any, HFEngine] = {}

    def get(self, family: str, **arguments: Any) -> HFEngine:
        key = (family, *sorted(arguments.items()))
        if key not in self._open:
            self._open[key] = HFEngine(str(tiny_model(family, num_hidden_layers=2)), **arguments)
            self._open[key].open()
        return self._open[key]

    def run(self, family: str, cases: list[Case], *, points: Any = None, **arguments: Any) -> Capture:
        engine = self.get(family, **arguments)
        return let_go(engine.run(cases, points=Selection(points), out=self._folder / f"{next(self._number)}"))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("captures"))


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return float((left.double() - right.double()).norm() / left.double().norm())


def assert_same(left: Capture, right: Capture, *, case: str, first: int = 0, limit: float = 1e-5) -> int:
    """Every point's rows from position ``first`` on; returns how many points that were."""
    assert list(left) == list(right)
    for capture in (left, right):
        spans = capture.spans(capture.point(next(iter(capture))), case)
        places = [s.position + n for s in spans for n in range(s.length)]
        assert places == list(range(capture.cases[case].positions))
    for key in left:
        a, b = left.rows(key, case)[first:], right.rows(key, case)[first:]
        assert len(a)
        assert error(a, b) < limit, (key, case)
    return len(list(left))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_case_by_case(engines: Engines, family: str) -> None:
    alone = engines.run(family, RAGGED)
    padded = engines.run(family, RAGGED, padding="left")
    assert {c: alone.generated(c) for c in alone.cases} == {c: padded.generated(c) for c in padded.cases}
    assert [len(alone.generated(c.id)) for c in RAGGED] == [0, 4, 2]
    for case in RAGGED:
        assert assert_same(alone, padded, case=case.id) > 20
        assert all(len(padded.rows(key, case.id)) == case.positions for key in padded)
    assert not padded.manifest.dropped


def test_neighbours_do_not_matter(engines: Engines) -> None:
    """The same case with other neighbours, and so other padding."""
    other = [Case(id="other", tokens=TOKENS[::-1] * 2, new_tokens=1), RAGGED[2]]
    first, second = (engines.run("gemma2", cases, padding="left") for cases in (RAGGED, other))
    assert_same(first, second, case="some")


def test_batches_run_one_after_the_other(engines: Engines) -> None:
    cases = [Case(id=f"c{n}", tokens=TOKENS[: n + 2], new_tokens=2, batch=1 - n % 2) for n in range(4)]
    capture = engines.run("qwen2", cases, padding="left")
    labelled = [[s.case for s in step] for step in capture.manifest.steps]
    assert labelled == [[1, 3], [1, 3], [0, 2], [0, 2]]
    alone = engines.run("qwen2", cases)
    for case in cases:
        assert_same(capture, alone, case=case.id)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_one_long_prefill(engines: Engines, family: str) -> None:
    forced = TOKENS[20:28]
    case = Case(id="a", tokens=TOKENS[:20], new_tokens=8, forced=forced)
    decoded = engines.run(family, [case])
    whole = engines.run(family, [Case(id="a", tokens=TOKENS[:27])])
    assert len(decoded.manifest.steps) == 8
    assert_same(decoded, whole, case="a", first=0)
    assert_same(decoded, whole, case="a", first=20)
    assert decoded.generated("a") == whole.rows("#logits", "a")[19:].argmax(-1).tolist()
    assert decoded.generated("a") != list(forced)
    assert decoded.continuation("a") == list(forced)


def test_a_wrong_token_would_show(engines: Engines) -> None:
    """The comparison above can fail: another forced token changes every position after it, and none before."""
    first, second = (
        engines.run("qwen2", [Case(id="a", tokens=TOKENS[:10], new_tokens=4, forced=forced)])
        for forced in ((1, 2, 3), (1, 9, 3))
    )
    left, right = (c.rows("model.layers.1", "a") for c in (first, second))
    assert error(left[:11], right[:11]) < 1e-6
    assert all(error(left[n], right[n]) > 1e-2 for n in (11, 12))


def test_forcing_some_tokens_leaves_the_rest_to_the_model(engines: Engines) -> None:
    case = Case(id="a", tokens=TOKENS[:9], new_tokens=5, forced=(1, 2))
    capture = engines.run("qwen2", [case])
    fed = capture.continuation("a")
    assert fed[:2] == [1, 2]
    again = engines.run("qwen2", [Case(id="a", tokens=(*case.tokens, *fed[:4]))])
    assert_same(capture, again, case="a")
    assert capture.generated("a") == again.rows("#logits", "a")[8:].argmax(-1).tolist()


def test_being_fed_its_own_choices_changes_nothing(engines: Engines) -> None:
    free = engines.run("gemma2", RAGGED)
    fed = engines.run("gemma2", [c.force(free.continuation(c.id)) for c in RAGGED])
    assert fed.manifest.generated == free.manifest.generated
    for case in RAGGED:
        assert_same(free, fed, case=case.id, limit=1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-5), ("float16", 0.02), ("bf16", 0.1)])
def test_other_precisions(engines: Engines, dtype: str, limit: float) -> None:
    exact = engines.run("qwen2", RAGGED[2:])
    fed = [RAGGED[2].force(exact.continuation("some"))]
    capture = engines.run("qwen2", fed, dtype=dtype)
    names = {"bf16": "bfloat16"}
    assert {p.dtype for p in capture.manifest.points} == {names.get(dtype, dtype)}
    assert capture.manifest.side.dtype == names.get(dtype, dtype)
    assert_same(exact, capture, case="some", limit=limit)


def test_only_selected_points_are_recorded(engines: Engines) -> None:
    capture = engines.run("qwen2", RAGGED, points=["*.mlp", "#logits"])
    assert list(capture) == ["model.layers.0.mlp", "model.layers.1.mlp", "#logits"]
    whole = engines.run("qwen2", RAGGED)
    assert torch.equal(capture.rows("#logits", "long"), whole.rows("#logits", "long"))


def test_every_module_with_a_result_is_a_point(engines: Engines) -> None:
    capture = engines.run("qwen2", RAGGED)
    modules = {p.module for p in capture.manifest.points}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert f"model.layers.1.self_attn.{name}" in modules
    assert {"model.embed_tokens", "model.layers.0.mlp.act_fn", "model.norm", "lm_head", ""} <= modules
    assert capture.point("#logits").source == "lm_head"
    assert capture.point("model.layers.1.input_layernorm#input").source == "model.layers.0"
    assert capture.point("model.layers.0.self_attn.o_proj#input").source == ""


def hooks(engine: HFEngine) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine._model.modules())


def test_hooks_are_gone_after_a_run_and_after_a_failure(engines: Engines, tmp_path: Path) -> None:
    engines.run("qwen2", RAGGED)
    engine = engines.get("qwen2")
    assert hooks(engine) == 0
    with pytest.raises(IndexError):
        engine.run([Case(id="a", tokens=(10**6,))], points=Selection(), out=tmp_path / "c")
    assert hooks(engine) == 0
    assert list(tmp_path.iterdir()) == []
    assert len(engines.run("qwen2", RAGGED[:1]).rows("model.norm", "one")) == 1


def test_it_says_what_it_is(engines: Engines) -> None:
    side = engines.run("qwen2", RAGGED, padding="left").manifest.side
    assert (side.engine, side.dtype, side.attention_backend) == ("hf", "float32", "eager")
    assert side.args["padding"] == "left"
    assert side.digest


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(tiny_model("qwen2", num_hidden_layers=2), tmp_path / "copy")
    return tmp_path / "copy"


def test_bad_arguments(copy: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown dtype 'float8'; did you mean"):
        HFEngine(str(copy), dtype="float8")
    with pytest.raises(UsageError, match="padding must be 'none' or 'left', not 'right'"):
        HFEngine(str(copy), padding="right")
    with pytest.raises(UsageError, match="no such folder"):
        HFEngine(str(copy / "gone"))
    assert HFEngine(str(copy), dtype="auto").checkpoint.path == copy


def test_truncated_weights_are_a_usage_error(copy: Path) -> None:
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UsageError, match="is truncated"):
        HFEngine(str(copy))


@pytest.mark.parametrize("arguments", [{"device": "nonsense"}, {"device": "cuda:99"}, {"attn_implementation": "none"}])
def test_a_model_that_cannot_be_loaded_so(copy: Path, arguments: dict[str, str]) -> None:
    engine = HFEngine(str(copy), **arguments)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="hf cannot load"):
        engine.open()
    engine.close()


def test_an_architecture_that_nobody_knows(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "no_such_model", "vocab_size": 4}')
    with pytest.raises(EngineError, match="hf cannot load"):
        HFEngine(str(copy)).open()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_rounded_as_another_engine_has_them(engines: Engines, dtype: str) -> None:
    """Embeddings are then those of bfloat16, and nothing else is rounded to it."""
    case = [Case(id="a", tokens=TOKENS)]
    rounded = engines.run("qwen2", case, dtype=dtype, weights_dtype="bfloat16")
    half = engines.run("qwen2", case, dtype="bfloat16")
    plain = engines.run("qwen2", case, dtype=dtype)
    ours, theirs, exact = (c.rows("model.embed_tokens", "a") for c in (rounded, half, plain))
    assert ours.dtype == getattr(torch, dtype)
    assert error(ours, theirs) == 0
    assert error(exact, theirs) > 1e-3
    norm = rounded.rows("model.layers.0.input_layernorm", "a")
    assert error(norm, norm.bfloat16()) > 1e-3
    assert rounded.manifest.side.args["weights_dtype"] == "bfloat16"
    assert "weights_dtype" not in plain.manifest.side.args


def test_weights_that_transformers_keeps_in_float32_are_not_rounded() -> None:
    model = torch.nn.ModuleDict({"router": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)}).double()
    model._keep_in_fp32_modules_strict = {"router"}  # type: ignore[assignment]
    before = {n: p.clone() for n, p in model.named_parameters()}
    round_weights(model, torch.bfloat16)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith("router")
        assert name.startswith("router") or torch.equal(weight, before[name].bfloat16().double())
