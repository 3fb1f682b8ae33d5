"""Loading: every element of a checkpoint lands where it belongs on every rank; what is missing or odd is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.config import NanoConfig
from paritykit.engines.nano.facts import weight_names
from paritykit.engines.nano.group import Alone
from paritykit.engines.nano.model import CausalLM
from paritykit.engines.nano.parameter import Build
from paritykit.engines.nano.weights import checkpoint_files, checkpoint_targets, load_checkpoint, read_tensors
from paritykit.errors import EngineError
from paritykit.results import Side
from paritykit.runner import weight_results
from paritykit.testing import tiny_model

FAMILIES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"]


def built(folder: Path, *, rank: int = 0, size: int = 1) -> CausalLM:
    config = NanoConfig.of(Checkpoint(folder))
    return CausalLM(config, Build(Alone(rank, size), torch.float32, torch.device("cpu")))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(folder, checkpoint_files(folder)))


def addressed(shapes: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint with the number of each element in the place of its value."""
    start = 0
    for name, tensor in sorted(shapes.items()):
        yield name, torch.arange(start, start + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        start += tensor.numel()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_is_held_by_some_rank_and_nothing_else_is(family: str, size: int) -> None:
    folder = tiny_model(family)
    tensors = tensors_of(folder)
    total = sum(t.numel() for t in tensors.values())
    held = torch.zeros(total, dtype=torch.int64)
    for rank in range(size):
        model = built(folder, rank=rank, size=size).double()
        assert set(checkpoint_targets(model)) == set(tensors)
        loaded = model.load_weights(addressed(tensors))
        assert loaded == {n for n, _ in model.named_parameters()}
        for _, parameter in model.named_parameters():
            assert not parameter.isnan().any()
        held += torch.bincount(torch.cat([p.flatten() for p in model.parameters()]).long(), minlength=total)
    padding = 0 if held[0] == 0 else int(held[0])
    held[0] = max(1, min(padding, size))  # address 0 is also the value of padding rows
    assert held.min() >= 1
    assert held.max() <= size


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 1), ("mixtral", 1), ("qwen3_moe", 2)])
def test_the_ledger_of_two_ranks_is_clean(family: str, layers: int) -> None:
    folder = tiny_model(family, num_hidden_layers=layers)
    ledgers = []
    for rank in range(2):
        model = built(folder, rank=rank, size=2)
        ledger = load_checkpoint(model, folder, rank=rank, provenance=True)
        assert ledger is not None
        ledgers.append(msgspec.structs.replace(ledger, names=weight_names(model)))
    side = Side(engine="nano", model=family, dtype="float32")
    results = weight_results(ledgers, side, Checkpoint(folder))
    assert results.summary.verdict == "pass", [f for f in results.findings if f.verdict != "pass"]


def test_the_table_of_fused_names_is_data_on_the_model() -> None:
    assert {k: tuple(v.values()) for k, v in CausalLM.packed_modules_mapping.items()} == {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }


def copy_of(tmp_path: Path, family: str = "qwen2") -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(family), folder)
    return folder, load_file(folder / "model.safetensors")


def test_shards_are_read_by_the_index(tmp_path: Path) -> None:
    folder, tensors = copy_of(tmp_path)
    names = sorted(tensors)
    files = {n: f"part-{i % 3}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    for indexed in (True, False):
        if indexed:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        else:
            (folder / "model.safetensors.index.json").unlink()
        model = built(folder)
        load_checkpoint(model, folder)
        expected = torch.cat([tensors[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv"])
        assert torch.equal(dict(model.named_parameters())["model.layers.0.self_attn.qkv_proj.weight"], expected)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.weight"),
        ("qwen2", "model.layers.1.mlp.up_proj.weight"),
        ("qwen2", "lm_head.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, family: str, name: str) -> None:
    folder, tensors = copy_of(tmp_path, family)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(EngineError, match=f"lacks the tensor\\(s\\) {name}"):
        load_checkpoint(built(folder), folder)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    folder, tensors = copy_of(tmp_path)
    save_file({n: t for n, t in tensors.items() if "layers" not in n}, folder / "model.safetensors")
    with pytest.raises(EngineError, match="and 43 more"):
        load_checkpoint(built(folder), folder)


def test_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder, tensors = copy_of(tmp_path)
    with pytest.raises(EngineError, match=r"a tensor 'model\.layers\.9\.mlp.*', and Qwen2ForCausalLM has none"):
        built(folder).load_weights([("model.layers.9.mlp.up_proj.weight", torch.zeros(1))])
    name = "model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(EngineError, match=f"checkpoint tensor '{name}' has shape \\[3, 128\\]"):
        built(folder).load_weights([(name, torch.zeros(3, 128))])
    harmless = [("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(16))]
    assert built(folder).load_weights(harmless) == set()
    tied = tiny_model("llama_tied")
    assert built(tied).load_weights([("lm_head.weight", torch.zeros(499, 96))]) == set()
    assert tensors


@pytest.mark.parametrize("what", ["cut", "index", "none", "listed"])
def test_unreadable_weights(tmp_path: Path, what: str) -> None:
    folder, _ = copy_of(tmp_path)
    file = folder / "model.safetensors"
    if what == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif what == "index":
        (folder / "model.safetensors.index.json").write_text("{")
    elif what == "listed":
        index = {"weight_map": dict.fromkeys(checkpoint_targets(built(folder)), "absent.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        file.unlink()
    with pytest.raises(EngineError, match=r"cannot read|has no \.safetensors files"):
        load_checkpoint(built(folder), folder)
