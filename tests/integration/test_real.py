"""Trained models: made once from what is installed, and the same function in every family that has their weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paritykit.case import cases
from paritykit.models import cases_for, resolve_model
from paritykit.testing import TRANSPLANTS, real
from paritykit.testing.real import SHORT
from paritykit.testing.transplants import transplanted_config
from tests.real import trained

pytestmark = pytest.mark.xdist_group("real")
ROOT = Path(real.__file__).parents[2]
IN_CI = ("granite", "ernie4_5")
"""One whose weights are scaled, one whose rows are moved and whose sums have another order."""
SPREAD = 4.0
"""As in tests/unit/test_transplants.py, where its reason is."""
QUESTION = "The capital of France is"
TEXT = (
    "A noise floor is how far two honest computations of the same numbers differ. 17 + 25 = 42; the capital of France"
)


def logits(folder: Path, text: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[tokens, vocabulary]`` in float64; every tensor of the folder must be one of the model's."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens).logits[0].double()
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@cache
def original(layers: int | None = None) -> tuple[torch.Tensor, float]:
    folder = trained("smollm2", num_hidden_layers=layers)
    found = logits(folder, TEXT)
    return found, distance(found, logits(folder, TEXT, torch.float64))


def test_smollm2_is_the_trained_model_with_its_config_as_it_comes() -> None:
    folder = trained("smollm2")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["tie_word_embeddings"]) == ("llama", "bfloat16", True)
    sizes = [config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")]
    assert sizes == [9, 3, 64, 576]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(logits(folder, QUESTION)[-1].argmax()) == " Paris"
    assert tokenizer.chat_template
    assert folder == resolve_model("real:smollm2").path == trained("smollm2")


def test_its_activations_are_those_of_a_trained_model() -> None:
    """What seeded weights never have: a few features of the first token are thousands of times the usual ones."""
    folder = trained("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[15][0].abs()
    assert hidden.max() > 300 * hidden.median()
    assert hidden.max(dim=1).values.argmax() == 0


def transplants() -> list[Any]:
    """A few of three layers; all of them, and whole, where time and room on a disk do not matter."""
    every = [(family, layers) for family in TRANSPLANTS for layers in (None, SHORT)]
    quick = [(family, SHORT) for family in IN_CI]
    return [pytest.param(*e, marks=[] if e in quick else [pytest.mark.deep]) for e in every]


@pytest.mark.parametrize(("family", "layers"), transplants())
def test_a_transplant_computes_the_same(family: str, layers: int | None) -> None:
    before, error = original(layers)
    found = logits(trained("smollm2", family=family, num_hidden_layers=layers), TEXT)
    assert 1e-8 < error < 1e-4
    assert distance(found, before) <= SPREAD * error
    assert torch.equal(found.argmax(1), before.argmax(1))


def test_the_config_of_a_transplant_is_known_without_its_weights() -> None:
    for family in IN_CI:
        known = transplanted_config(trained("smollm2"), family, num_hidden_layers=SHORT)
        written = trained("smollm2", family=family, num_hidden_layers=SHORT) / "config.json"
        assert known == json.loads(written.read_text())
        assert real.config_named(f"real:smollm2,family={family},num_hidden_layers={SHORT}") == known


def test_some_layers_are_another_model() -> None:
    folder = resolve_model("real:smollm2,family=granite,num_hidden_layers=3").path
    assert folder == trained("smollm2", family="granite", num_hidden_layers=3)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["architectures"]) == (3, ["GraniteForCausalLM"])
    assert distance(logits(folder, TEXT), original()[0]) > 0.1


def test_texts_through_the_real_tokenizer() -> None:
    found = cases_for(resolve_model(str(trained("smollm2"))), cases("text"))
    lengths = [len(c.tokens) for c in found]
    assert 16 <= lengths[0] <= 32
    assert 1500 <= lengths[-1] <= 2048
    assert lengths == sorted(lengths)
    chat = AutoTokenizer.from_pretrained(trained("smollm2")).decode(found[1].tokens)
    assert chat.startswith("<|im_start|>system\nYou answer in one short sentence.<|im_end|>")
    assert chat.endswith("<|im_start|>assistant\n")


def test_minilm_is_as_its_package_has_it() -> None:
    folder = trained("minilm")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("bert", 6)
    assert {"tokenizer.json", "modules.json", "model.safetensors", "1_Pooling"} <= {f.name for f in folder.iterdir()}


def test_two_processes_make_one_folder(tmp_path: Path) -> None:
    trained("minilm")
    code = "from paritykit.testing import real_model; print(real_model('minilm'))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_ASSETS_CACHE": str(tmp_path)},
        )
        for _ in range(2)
    ]
    told = {process.communicate(timeout=120)[0] for process in both}
    (folder,) = (tmp_path / "paritykit" / "real").iterdir()
    assert told == {f"{folder}\n"}
    assert (folder / "config.json").is_file()
