"""What kinds of model the reference runs: state-space ones as well; what it does not run is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.vllm.limits import default_lengths
from paritykit.errors import EngineError, UsageError
from paritykit.testing import tiny_model

TOKENS = tuple(range(3, 3 + 17 * 23, 23))
_SMALL: dict[str, Any] = {
    "vocab_size": 499,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_HEADS = {**_SMALL, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {**_SMALL, "state_size": 16, "intermediate_size": 128, "time_step_rank": 8},
    "mamba2": {**_SMALL, "state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 32},
    "lfm2": {**_HEADS, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": {
        **_HEADS,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 4,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
    },
}


def written(kind: str, folder: Path) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **RECURRENT[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_state_is_handed_on_whatever_it_is_called(kind: str, tmp_path: Path) -> None:
    """Tokens one at a time give what one pass over all of them gives."""
    engine = HFEngine(written(kind, tmp_path / kind))
    engine.open()
    stepped = Case(id="a", tokens=TOKENS[:12], new_tokens=6, forced=TOKENS[12:17])
    whole = Case(id="a", tokens=TOKENS[:17])
    logits = [
        engine.run([case], points=Selection(["#logits"]), out=tmp_path / str(n)).rows("#logits", "a").double()
        for n, case in enumerate((stepped, whole))
    ]
    assert logits[0].shape == (17, 499)
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 1e-5


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_a_state_space_model_in_float64(kind: str, tmp_path: Path) -> None:
    engine = HFEngine(written(kind, tmp_path / kind), dtype="float64")
    engine.open()
    capture = engine.run([Case(id="a", tokens=TOKENS, new_tokens=2)], points=Selection(["#logits"]), out=tmp_path / "c")
    assert capture.rows("#logits", "a").dtype == torch.float64


def changed(folder: Path, **config: Any) -> str:
    made = tiny_model("qwen2", folder, num_hidden_layers=2)
    path = made / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(made)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "a Qwen2ForSequenceClassification"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "a T5ForConditionalGeneration"),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, "a LlavaForConditional"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "a BertModel"),
        ({"architectures": ["Unheard"], "model_type": "qwen2_vl"}, "an? Unheard of model_type 'qwen2_vl'"),
    ],
)
def test_what_continues_no_text_is_refused_in_one_line(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        HFEngine(changed(tmp_path / "m", **config)).open()
    text = str(caught.value)
    assert "AutoModelForCausalLM" in text
    assert "\n" not in text
    assert len(text) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("named", ["Qwen2ForCausalLM", "MyQwen2ForCausalLM"])
def test_a_class_of_ones_own_is_taken_for_its_model_type(named: str, tmp_path: Path) -> None:
    HFEngine(changed(tmp_path / "m", architectures=[named])).open()


def test_no_weight_is_made_up(tmp_path: Path) -> None:
    folder = Path(changed(tmp_path / "m"))
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        EngineError, match=r"Qwen2ForCausalLM needs .* at random: model\.layers\.1\.mlp\.up_proj"
    ) as caught:
        HFEngine(str(folder)).open()
    assert "\n" not in str(caught.value)


def test_tied_weights_are_not_made_up() -> None:
    HFEngine(str(tiny_model("llama_tied", num_hidden_layers=2))).open()


def test_a_length_is_the_models_own(tmp_path: Path) -> None:
    """Whisper's decoder calls it ``max_target_positions``."""
    folder = Path(changed(tmp_path / "m", max_target_positions=128))
    assert default_lengths(Checkpoint.find(str(folder))) == 128
