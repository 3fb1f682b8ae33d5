"""A user's own module against the reference: at parity with itself, and one changed weight is found by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import paritykit as pk
from paritykit.captures.recorder import Selection
from paritykit.engines.module import ModuleEngine
from paritykit.testing import tiny_model

CASES = [
    pk.Case(id="a", tokens=tuple(range(5, 45)), new_tokens=4),
    pk.Case(id="b", tokens=(498,), new_tokens=0),
    pk.Case(id="c", tokens=(7, 9, 400), new_tokens=3, batch=1),
]


@pytest.fixture(scope="module", params=["qwen2", "gemma2", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Path:
    return tiny_model(family, num_hidden_layers=2)


@pytest.fixture(scope="module")
def reference(model: Path) -> pk.Capture:
    return pk.capture(pk.engine("hf", str(model), isolated=False), cases=CASES)


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def forward(model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids, position_ids=positions).logits
    return logits


def run(reference: pk.Capture, module: nn.Module, **options: Any) -> pk.ParityRun:
    engine = pk.engine("module", model=module, forward=options.pop("forward", forward), **options)
    return pk.compare(reference=reference, candidate=pk.capture(engine, cases=CASES, follow=reference))


def test_the_same_model_is_at_parity(reference: pk.Capture, model: Path) -> None:
    found = run(reference, load(model))
    assert found.summary.verdict == "pass", found.summary
    assert found.summary.compared > 100
    assert found.first_divergence is None
    assert found.summary.checks == {"modules": "pass", "logits": "pass", "tokens": "pass"}
    found.raise_on_failure()


CULPRITS = {
    "qwen2": ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj",
              "model.layers.1.post_attention_layernorm", "model.norm", "lm_head"],
    "gemma2": ["model.layers.1.self_attn.o_proj", "model.layers.0.pre_feedforward_layernorm"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.wpe"],
}  # fmt: skip


def test_one_changed_weight_is_named(reference: pk.Capture, model: Path, family: str) -> None:
    for culprit in CULPRITS[family]:
        changed = load(model)
        weight = changed.get_submodule(culprit).weight
        weight.data.view(-1)[: weight.numel() // 2] *= 1.02
        found = run(reference, changed)
        assert found.summary.verdict == "fail"
        assert found.first_divergence is not None
        assert (found.first_divergence.point, found.first_divergence.origin) == (culprit, "introduced")
        introduced = {f.point for f in found.results.findings if f.origin == "introduced"}
        assert introduced == {culprit}
        with pytest.raises(pk.ParityFailure, match=culprit):
            found.raise_on_failure()


def test_all_changed_weights_are_named(reference: pk.Capture, model: Path, family: str) -> None:
    """Replayed, the later ones are found too: they were handed something wrong, and are wrong all the same."""
    changed = load(model)
    for culprit in CULPRITS[family]:
        weight = changed.get_submodule(culprit).weight
        weight.data.view(-1)[: weight.numel() // 2] *= 1.02
    engine = pk.engine("module", model=changed, forward=forward)
    candidate = pk.capture(engine, cases=CASES, follow=reference)
    found = pk.compare(reference=reference, candidate=candidate, engine=engine)
    assert {c.point for c in found.summary.culprits} == set(CULPRITS[family])
    assert {f.located for f in found.results.findings if f.origin == "introduced"} == set(CULPRITS[family])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in changed.modules())
    alone = pk.compare(reference=reference, candidate=candidate)
    assert alone.summary.culprits == []


def test_a_router_hides_no_expert_and_is_not_confused_with_one() -> None:
    """Its shares and choices go on beside its logits, which alone can be put right: what follows is not blamed."""
    model = tiny_model("mixtral", num_hidden_layers=2)
    hf = pk.capture(pk.engine("hf", str(model), isolated=False), cases=CASES)
    for module, parameter in (("gate", "weight"), ("experts", "down_proj")):
        changed = load(model)
        getattr(changed.model.layers[0].mlp.get_submodule(module), parameter).data[:2] *= 1.1
        changed.model.layers[1].self_attn.q_proj.weight.data *= 1.02
        engine = pk.engine("module", model=changed, forward=forward)
        found = pk.compare(reference=hf, candidate=pk.capture(engine, cases=CASES, follow=hf), engine=engine)
        culprits = {c.point for c in found.summary.culprits}
        assert culprits == {f"model.layers.0.mlp.{module}", "model.layers.1.self_attn.q_proj"}


@pytest.fixture(scope="module")
def small() -> Path:
    return tiny_model("qwen2", num_hidden_layers=2)


def test_load_is_called_and_dtype_kept(small: Path) -> None:
    empty, full = load(small), load(small)
    for parameter in empty.parameters():
        parameter.data.zero_()
    hf = pk.capture(pk.engine("hf", str(small), isolated=False, dtype="float64"), cases=CASES[2:])
    engine = pk.engine(
        "module",
        model=empty,
        forward=forward,
        dtype="float64",
        load=lambda m: m.load_state_dict(full.state_dict()),
        name="mine",
    )
    found = pk.compare(reference=hf, candidate=pk.capture(engine, cases=CASES[2:], follow=hf))
    assert found.summary.verdict == "pass", found.summary
    side = found.results.run.candidate
    assert (side.engine, side.dtype) == ("mine", "float64")


WRONG: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "too few rows": (lambda t: t[:, 1:], r"returned \[1, 39, 499\] for 40 tokens"),
    "too many rows": (lambda t: t.repeat(2, 1, 1), r"returned \[2, 40, 499\] for 40 tokens"),
    "the last row only": (lambda t: t[0, -1], r"returned \[499\] for 40 tokens"),
    "a number": (lambda t: t.sum(), r"returned \[\] for 40 tokens"),
    "transposed": (lambda t: t[0].t(), r"returned \[499, 40\] for 40 tokens"),
    "a tuple": (lambda t: (t,), "must return its logits, not tuple"),
    "text": (lambda t: "logits", "must return its logits, not str"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_forward_of_another_shape(small: Path, tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    module = load(small)
    engine = ModuleEngine(module, forward=lambda m, i, p: change(forward(m, i, p)), name="mine")
    with pytest.raises(pk.EngineError, match=f"forward of engine 'mine' {said}"):
        pk.capture(engine, cases=[pk.Case(id="a", tokens=CASES[0].tokens)], out=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("shape", [(1, 40, 499), (40, 499)], ids=str)
def test_logits_with_and_without_batch(small: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    engine = ModuleEngine(load(small), forward=lambda m, i, p: forward(m, i, p).reshape(shape))
    capture = engine.run([pk.Case(id="a", tokens=CASES[0].tokens)], points=Selection(), out=tmp_path / "c")
    assert capture.rows("#logits", "a").shape == (40, 499)


def test_a_forward_without_logits_is_for_modules_only(small: Path) -> None:
    def silent(model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        model.model(input_ids, position_ids=positions)

    hf = pk.capture(pk.engine("hf", str(small), isolated=False), cases=CASES[2:])
    capture = pk.capture(pk.engine("module", model=load(small), forward=silent), cases=CASES[2:], follow=hf)
    assert "#logits" not in capture.points
    found = pk.compare(reference=hf, candidate=capture, checks=["modules"])
    assert not found.summary.failed
    assert found.summary.compared > 20
    with pytest.raises(pk.EngineError, match="returned no logits to choose the new tokens of 'c' by"):
        pk.capture(pk.engine("module", model=load(small), forward=silent), cases=CASES[2:])


def test_new_tokens_are_those_of_the_reference(small: Path) -> None:
    """Left alone, forced in part, and forced to the end."""
    hf = pk.engine("hf", str(small), isolated=False)
    module = pk.engine("module", model=load(small), forward=forward)
    for forced in ((), (3,), (3, 4), (3, 4, 5)):
        case = pk.Case(id="c", tokens=(7, 9, 400), new_tokens=3, forced=forced)
        first, second = (pk.capture(e, cases=[case]) for e in (hf, module))
        assert first.generated("c") == second.generated("c")
        assert first.continuation("c") == second.continuation("c")
        assert len(second.generated("c")) == 3
        assert len(second.rows("model.norm", "c")) == 5


def test_a_plain_module_needs_no_forward(tmp_path: Path) -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    capture = ModuleEngine(Toy()).run([pk.Case(id="a", tokens=(1, 2, 3))], points=Selection(), out=tmp_path / "c")
    assert list(capture) == ["embed", "head#input", "head", "#logits"]
    assert torch.equal(capture.rows("head", "a"), capture.rows("#logits", "a"))


@pytest.mark.parametrize("model", [None, "text", 3, nn.Linear])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(pk.UsageError, match=r"needs an nn\.Module as model, not"):
        pk.engine("module", model=model)


def test_arguments_it_does_not_take() -> None:
    with pytest.raises(pk.UsageError, match=r"engine 'module': .*unexpected keyword argument 'forwards'"):
        pk.engine("module", model=nn.Linear(1, 1), forwards=forward)


def test_cases_that_cannot_be_run(small: Path) -> None:
    engine = pk.engine("hf", str(small), isolated=False)
    with pytest.raises(pk.UsageError, match="token id 499 is outside the vocabulary"):
        pk.capture(engine, cases=[pk.Case(id="a", tokens=(499,))])
    with pytest.raises(pk.UsageError, match="case id 'a' is used twice"):
        pk.capture(engine, cases=[pk.Case(id="a", tokens=(1,)), pk.Case(id="a", tokens=(2,))])
