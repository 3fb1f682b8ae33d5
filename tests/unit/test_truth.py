"""The reference in float64 is a truth: it equals a float64 computation that shares nothing with transformers."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from paritykit.captures.reader import Capture, let_go
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.engines.features import parameter_names
from paritykit.engines.hf import HFEngine
from paritykit.engines.widen import NarrowOps, is_narrow
from paritykit.errors import EngineError
from paritykit.testing import TINY_FAMILIES, tiny_model
from tests.exact import Exact, default_frequencies

TOKENS = tuple(range(3, 3 + 11 * 40, 11))
CASE = Case(id="a", tokens=TOKENS)
WRITTEN_OUT = ("qwen2", "llama", "gemma2", "mixtral")
"""Families that ``Exact`` computes: biases, tying, softcaps and windows, experts."""
UNROUNDED = {"model.embed_tokens"}
"""Points that are exact in any precision that holds the weights."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Capture]:
    """A run of an engine that stays open; every capture gets a folder of its own."""
    folder, number = tmp_path_factory.mktemp("captures"), itertools.count()
    opened: dict[Any, HFEngine] = {}

    def run_engine(
        model: Path, cases: list[Case] | None = None, *, dtype: str = "float64", **arguments: Any
    ) -> Capture:
        key = (model, dtype, *arguments.items())
        if key not in opened:
            opened[key] = HFEngine(str(model), dtype=dtype, **arguments)
            opened[key].open()
        return let_go(opened[key].run(cases or [CASE], points=Selection(), out=folder / str(next(number))))

    return run_engine


def error(truth: torch.Tensor, other: torch.Tensor) -> float:
    assert truth.shape == other.shape
    return float((truth - other).norm() / truth.norm())


def errors(exact: dict[str, torch.Tensor], capture: Capture) -> dict[str, float]:
    return {key: error(rows, capture.rows(key, "a")) for key, rows in exact.items()}


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_it_equals_an_independent_float64_computation(run: Any, family: str) -> None:
    model = tiny_model(family, num_hidden_layers=2)
    found = errors(Exact(model, family).run(TOKENS), run(model))
    assert len(found) > 25
    assert max(found.values()) < 1e-13, found


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_without_widening_it_does_not(run: Any, family: str) -> None:
    model = tiny_model(family, num_hidden_layers=2)
    found = errors(Exact(model, family).run(TOKENS), run(model, widen=False))
    assert min(v for k, v in found.items() if k not in UNROUNDED) > 1e-9, found


@settings(max_examples=6, deadline=None)
@given(tokens=st.lists(st.integers(0, 498), min_size=1, max_size=50), new=st.integers(0, 3), padded=st.booleans())
def test_it_does_for_any_tokens(run: Any, tokens: list[int], new: int, padded: bool) -> None:
    """Whatever comes from the KV cache, and beside whatever padding."""
    model = tiny_model("gemma2", num_hidden_layers=2)
    case = Case(id="a", tokens=tuple(tokens), new_tokens=new)
    neighbour = Case(id="b", tokens=(*tokens, 1, 2, 3))
    capture = run(model, [case, neighbour], padding="left" if padded else "none")
    fed = (*tokens, *capture.continuation("a"))[: case.positions]
    found = errors(Exact(model, "gemma2").run(fed), capture)
    assert max(found.values()) < 1e-13, found


def linear(config: dict[str, Any]) -> torch.Tensor:
    return default_frequencies(config) / config["rope_parameters"]["factor"]


def dynamic(config: dict[str, Any]) -> torch.Tensor:
    """NTK-aware scaling: a larger base, by how much longer the sequence is than what the model is made for."""
    rope, size = config["rope_parameters"], config["head_dim"]
    stretch = rope["factor"] * len(TOKENS) / config["max_position_embeddings"] - (rope["factor"] - 1)
    base = rope["rope_theta"] * stretch ** (size / (size - 2))
    return default_frequencies({**config, "rope_parameters": {"rope_theta": base}})


def llama3(config: dict[str, Any]) -> torch.Tensor:
    """Long waves are slowed down, short ones left, those between blended."""
    rope = config["rope_parameters"]
    found = []
    for plain in default_frequencies(config).tolist():
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        share = min(max(share, 0.0), 1.0)
        found.append((1 - share) * plain / rope["factor"] + share * plain)
    return torch.tensor(found, dtype=torch.float64)


def yarn(config: dict[str, Any]) -> torch.Tensor:
    """As llama3, with a ramp over the index of the frequency."""
    rope, size = config["rope_parameters"], config["head_dim"]
    length = rope["original_max_position_embeddings"]

    def index(turns: float) -> float:
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), size - 1)
    found = []
    for n, plain in enumerate(default_frequencies(config).tolist()):
        slowed = min(max((n - low) / (high - low), 0.0), 1.0)
        found.append(plain / rope["factor"] * slowed + plain * (1 - slowed))
    return torch.tensor(found, dtype=torch.float64)


def longrope(config: dict[str, Any]) -> torch.Tensor:
    """A divisor for each frequency: the long ones here, as the case is longer than what the model was made for."""
    divisors = torch.tensor(config["rope_parameters"]["long_factor"], dtype=torch.float64)
    return default_frequencies(config) / divisors


ROPES: dict[str, tuple[dict[str, Any], Callable[..., torch.Tensor], float]] = {
    "linear": ({"factor": 3.0}, linear, 1.0),
    "dynamic": ({"factor": 3.0}, dynamic, 1.0),
    "llama3": (
        {"factor": 7.0, "low_freq_factor": 1.1, "high_freq_factor": 3.3, "original_max_position_embeddings": 16},
        llama3,
        1.0,
    ),
    "yarn": ({"factor": 7.0, "original_max_position_embeddings": 16}, yarn, 0.1 * math.log(7.0) + 1),
    "longrope": (
        {
            "factor": 7.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 16,
            "long_factor": [1 + n / 7 for n in range(16)],
        },
        longrope,
        math.sqrt(1 + math.log(7.0) / math.log(16)),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_frequencies_are_made_anew_in_float64(run: Any, tmp_path: Path, kind: str) -> None:
    """At the start, and for the kinds that change with the length during the run."""
    fields, frequencies, scale = ROPES[kind]
    rope = {"rope_type": kind, "rope_theta": 5000.0, **fields}
    model = tiny_model("llama", tmp_path / kind, num_hidden_layers=1, max_position_embeddings=32, rope_parameters=rope)
    config = json.loads((model / "config.json").read_text())
    exact = Exact(model, "llama", frequencies=frequencies(config), scale=scale).run(TOKENS)
    assert max(errors(exact, run(model)).values()) < 1e-13
    assert errors(exact, run(model, widen=False))["model.layers.0.self_attn#key_cache"] > 1e-9


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_no_operation_of_a_truth_is_narrow(tmp_path: Path, family: str) -> None:
    engine = HFEngine(str(tiny_model(family, num_hidden_layers=2)), dtype="float64")
    engine.open()
    assert not [n for n, t in engine._model.state_dict(keep_vars=True).items() if is_narrow(t)]
    assert not [n for n, t in engine._model.named_buffers() if is_narrow(t)]
    cases = [Case(id="a", tokens=TOKENS, new_tokens=2), Case(id="b", tokens=TOKENS[:7])]
    with NarrowOps() as ops:
        capture = engine.run(cases, points=Selection(), out=tmp_path / "c")
    assert not ops.found
    assert {p.dtype for p in capture.manifest.points} == {"float64"}
    capture.verify()


def test_one_narrow_operation_would_be_seen(tmp_path: Path) -> None:
    """The check above can fail."""
    engine = HFEngine(str(tiny_model("qwen2", num_hidden_layers=1)), dtype="float64", widen=False)
    engine.open()
    with NarrowOps() as ops:
        engine.run([CASE], points=Selection(()), out=tmp_path / "c")
    assert any("modeling_qwen2" in place for place in ops.found.values())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def loaded(folder: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in the checkpoint."""
    engine = HFEngine(str(folder), dtype="float64", **arguments)
    engine.open()
    names = parameter_names(engine._model, list(stored(folder) or engine._model.state_dict()))
    own = engine._model.state_dict()
    return {tensor: own[name] for tensor, name in names.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_weights_are_the_stored_values(family: str, dtype: str) -> None:
    folder = tiny_model(family, num_hidden_layers=1, dtype=dtype)
    values, found = stored(folder), loaded(folder)
    assert {t.dtype for t in values.values()} == {getattr(torch, dtype)}
    assert values.keys() == found.keys()
    for name, value in values.items():
        assert found[name].dtype == torch.float64
        assert torch.equal(found[name], value.double()), name


def test_so_are_those_of_older_files(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model("qwen2", num_hidden_layers=1), folder)
    values = stored(folder)
    (folder / "model.safetensors").unlink()
    torch.save(values, folder / "pytorch_model.bin")
    found = loaded(folder)
    for name, value in values.items():
        assert torch.equal(found[name], value.double()), name


def test_the_truth_of_a_bfloat16_checkpoint_is_that_of_its_values_in_float32(run: Any, tmp_path: Path) -> None:
    half = tiny_model("gemma2", num_hidden_layers=1, dtype="bfloat16")
    shutil.copytree(half, tmp_path / "wide")
    from safetensors.torch import save_file

    values = {n: t.float() for n, t in stored(half).items()}
    save_file(values, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
    first, second = run(half), run(tmp_path / "wide")
    for key in first:
        assert torch.equal(first.rows(key, "a"), second.rows(key, "a"))


def test_a_capture_keeps_all_bits(run: Any) -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    capture = run(model)
    again = Capture.open(capture.path)
    again.verify()
    exact = Exact(model, "qwen2").run(TOKENS)
    logits = again.rows("#logits", "a")
    assert logits.dtype == torch.float64
    assert error(exact["#logits"], logits) < 1e-13 < error(exact["#logits"], logits.float().double())


def test_it_says_whether_it_widens(run: Any) -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    assert run(model).manifest.side.args["widen"] == "True"
    assert run(model, widen=False).manifest.side.args["widen"] == "False"
    assert "widen" not in run(model, dtype="float32").manifest.side.args


def test_float32_is_left_as_it_is(run: Any) -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    first, second = run(model, dtype="float32"), run(model, dtype="float32", widen=False)
    for key in first:
        assert first.point(key).dtype == "float32"
        assert torch.equal(first.rows(key, "a"), second.rows(key, "a"))


def test_nothing_of_it_stays_behind(run: Any) -> None:
    run(tiny_model("qwen2", num_hidden_layers=1))
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1).double().float().dtype == torch.float32


def test_an_attention_that_insists_on_float32(run: Any, tmp_path: Path) -> None:
    """GPT-2 has one that refuses any other dtype: the plain one, which equals it, takes its place."""
    plain = tiny_model("gpt2", num_hidden_layers=1)
    shutil.copytree(plain, tmp_path / "insisting")
    config = json.loads((plain / "config.json").read_text())
    (tmp_path / "insisting" / "config.json").write_text(json.dumps({**config, "reorder_and_upcast_attn": True}))
    truth = run(plain)
    for widen in (True, False):
        insisting = run(tmp_path / "insisting", widen=widen)
        assert all(torch.equal(truth.rows(key, "a"), insisting.rows(key, "a")) for key in truth)


class Lowering(nn.Module):
    """Computes in float32 where widening does not reach."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.lower = torch.jit.CompilationUnit("def lower(x):\n    return x.float()\n").lower

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lower(self.inner(x))


@pytest.mark.parametrize("place", ["model.norm", "lm_head"])
def test_a_model_that_cannot_be_widened_is_refused(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def load_planted(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_submodule(place, Lowering(model.get_submodule(place)))
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_planted)
    engine = HFEngine(str(tiny_model("qwen2", num_hidden_layers=1)), dtype="float64")
    with pytest.raises(EngineError, match=r"no float64 .* works in fewer bits; widen=False"):
        engine.open()


def test_so_is_a_point_in_fewer_bits(tmp_path: Path) -> None:
    engine = HFEngine(str(tiny_model("qwen2", num_hidden_layers=1)), dtype="float64")
    engine.open()
    engine._model.set_submodule("lm_head", Lowering(engine._model.lm_head))
    with pytest.raises(EngineError, match=r"no float64 for lm_head.*, which is float32; widen=False"):
        engine.run([CASE], points=Selection(), out=tmp_path / "c")
    assert not list(tmp_path.iterdir())
