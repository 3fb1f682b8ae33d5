"""The layout of a small sibling, carried over to a large model, is the layout that the large one's own loader has."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.engine import NanoEngine
from paritykit.engines.sibling import kinds, make_sibling, sibling_config
from paritykit.errors import EngineError
from paritykit.provenance.scale import ScaleError, scale_map
from paritykit.provenance.sources import list_sources
from paritykit.provenance.trace import describe, named_tensors, tensor_infos, trace
from paritykit.provenance.weightmap import Gap, Landing, ParameterInfo, Span, TensorInfo, WeightMap
from paritykit.testing import tiny_model
from tests.contract import toy

LARGER: dict[str, dict[str, Any]] = {
    "qwen2": {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 768, "vocab_size": 1201},
    "gemma3": {"num_hidden_layers": 12, "head_dim": 64},
    "mixtral": {"num_hidden_layers": 5, "intermediate_size": 512, "head_dim": 64, "num_local_experts": 12},
    "qwen3_moe": {"num_hidden_layers": 6, "num_experts": 16, "moe_intermediate_size": 128},
}


def layout(model: Path) -> WeightMap:
    engine = NanoEngine(str(model), dtype="float32")
    engine.open()
    try:
        return engine.ledger()[0].found
    finally:
        engine.close()


@pytest.mark.parametrize("family", LARGER)
def test_layout_carries_over(family: str, tmp_path: Path) -> None:
    large = tiny_model(family, **LARGER[family])
    wanted = layout(large)
    small = layout(make_sibling(Checkpoint.find(str(large)), tmp_path / "small"))
    assert len(small.landings) < len(wanted.landings)
    found = scale_map(small, wanted.tensors, wanted.parameters, rank=0)
    assert set(map(repr, found.landings)) == set(map(repr, wanted.landings))
    assert set(map(repr, found.gaps)) == set(map(repr, wanted.gaps))


def test_sibling_keeps_every_kind_of_layer() -> None:
    checkpoint = Checkpoint.find(str(tiny_model("qwen3_moe", num_hidden_layers=6)))
    assert kinds(checkpoint) == 2
    config = sibling_config(checkpoint, ranks=2)
    assert config["num_hidden_layers"] == 2
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    windows = Checkpoint.find(str(tiny_model("gemma3", num_hidden_layers=12)))
    assert sibling_config(windows, ranks=1)["layer_types"][-1] == "full_attention"


def test_a_tensor_that_the_large_checkpoint_lacks_leaves_its_parameter_unwritten() -> None:
    small = toy_map()
    tensors = {n: t for n, t in small.tensors.items() if n != "layers.1.k.weight"}
    found = scale_map(small, tensors, small.parameters, rank=0)
    assert [(g.parameter, g.kind) for g in found.gaps] == [("layers.1.qkv", "unwritten")]


@pytest.mark.parametrize("shape", [(11, 6), (10, 7), (5, 6)])
def test_a_parameter_that_is_not_filled_alike_is_refused(shape: tuple[int, int]) -> None:
    small = toy_map()
    odd = ParameterInfo(name="layers.0.qkv", shape=shape, dtype="float32")
    with pytest.raises(ScaleError, match=r"layers\.0\.qkv"):
        scale_map(small, small.tensors, [odd], rank=0)


def test_a_parameter_of_another_kind_is_refused() -> None:
    small = toy_map()
    with pytest.raises(ScaleError, match="has no like"):
        scale_map(small, small.tensors, [ParameterInfo(name="other", shape=(2,), dtype="float32")], rank=0)


def test_vocabulary_shards_follow_the_ranks_and_not_the_share() -> None:
    """499 rows on two ranks are 256 and 243, not two halves."""
    landing: dict[str, Any] = {"tensor": "embed", "parameter": "embed", "rank": 1, "axes": (0, 1)}
    small = WeightMap(
        tensors={"embed": TensorInfo(shape=(499, 4), dtype="float32")},
        parameters=[ParameterInfo(name="embed", rank=1, shape=(256, 4), dtype="float32")],
        landings=[Landing(**landing, source=(Span(256, 243), Span(0, 4)), target=(Span(0, 243), Span(0, 4)))],
    )
    tensors = {"embed": TensorInfo(shape=(1000, 8), dtype="float32")}
    info = ParameterInfo(name="embed", rank=1, shape=(512, 8), dtype="float32")
    small.gaps = [Gap(parameter="embed", rank=1, target=(Span(243, 13), Span(0, 4)), kind="constant", value=0.0)]
    found = scale_map(small, tensors, [info], rank=1)
    assert found.landings[0].source == (Span(512, 488), Span(0, 8))
    assert found.gaps[0].target == (Span(488, 24), Span(0, 8))


def test_no_sibling_of_an_unknown_architecture(tmp_path: Path) -> None:
    checkpoint = Checkpoint.find(str(toy.write_checkpoint(tmp_path / "toy")))
    with pytest.raises(EngineError, match="no small sibling"):
        make_sibling(checkpoint, tmp_path / "small")


def toy_map() -> WeightMap:
    model, weights = toy.Toy(), toy.tensors()
    with torch.no_grad():
        found = trace(partial(named_tensors, model), weights=weights.items, load=partial(toy.load_weights, model))
    assert tensor_infos(list_sources(weights.items())) == found.tensors
    assert describe(named_tensors(model), 0) == found.parameters
    return found
