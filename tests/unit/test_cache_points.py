"""The KV cache as points: what transformers caches, packed layouts, tails behind a window, who inherits from whom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paritykit.captures.manifest import CACHE_PORTS, Segment
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.checks.base import Subject
from paritykit.checks.modules import cached
from paritykit.diagnose.locate import Graph, locate
from paritykit.engines.hf import HFEngine
from paritykit.engines.vllm.kv import BlockLayout, CacheReader, stored_dtype
from paritykit.errors import EngineError
from paritykit.mapping.build import NO_CACHE, build_mapping
from paritykit.runner import compare_captures
from paritykit.testing import tiny_model
from paritykit.testing.drawn.model import drawn_model
from tests.made import finding, manifest, write_capture

KEY, VALUE = (f"attn#{port}" for port in CACHE_PORTS)
TOKENS = tuple((7 * k + 3) % 499 for k in range(40))


class PackedLayer:
    """An attention layer whose blocks are packed by an order of their own, with room that is never written."""

    def __init__(self, order: torch.Tensor, shape: tuple[int, int, int], *, blocks: int, dtype: torch.dtype) -> None:
        self.num_kv_heads, self.head_size = shape[1:]
        self.shape, self.order, self.impl = shape, order, self
        self.kv_cache = torch.zeros(blocks, 2, len(order) // 2, dtype=dtype)

    def do_kv_cache_update(self, _: Any, key: Any, value: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        size, flat = self.shape[0], cache.view(len(cache), -1)
        own = math.prod(self.shape)
        for row, slot in enumerate(slots.tolist()):
            places = self.order[:own].view(self.shape)[slot % size]
            flat[slot // size, places] = key[row]
            flat[slot // size, self.order[own : 2 * own].view(self.shape)[slot % size]] = value[row]


@st.composite
def packed(draw: st.DrawFn) -> PackedLayer:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)))
    room = 2 * math.prod(shape) + 2 * draw(st.integers(0, math.prod(shape[1:]) - 1))
    order = torch.tensor(draw(st.permutations(range(room))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return PackedLayer(order, shape, blocks=4, dtype=dtype)


@given(packed(), st.permutations(range(4)), st.integers(0, 2**31))
def test_whatever_the_layout_what_was_written_is_read(layer: PackedLayer, table: list[int], seed: int) -> None:
    size = layer.shape[0]
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 4 * size + 1, (), generator=generator))
    keys, values = (
        torch.randn(length, *layer.shape[1:], generator=generator).to(layer.kv_cache.dtype) for _ in range(2)
    )
    slots = torch.tensor([table[p // size] * size + p % size for p in range(length)])
    layer.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
    before = layer.kv_cache.clone()
    start, (k, v) = CacheReader().read(layer, torch.tensor(table, dtype=torch.int32), length)
    assert start == 0
    assert torch.equal(k, keys)
    assert torch.equal(v, values)
    assert torch.equal(layer.kv_cache, before)


def test_large_blocks_need_several_digits() -> None:
    shape = (64, 4, 80)
    order = torch.randperm(2 * math.prod(shape), generator=torch.Generator().manual_seed(1))
    layout = BlockLayout.find(PackedLayer(order, shape, blocks=1, dtype=torch.bfloat16))
    assert torch.equal(torch.cat([layout.keys.flatten(), layout.values.flatten()]), order)


class Rounding(PackedLayer):
    def do_kv_cache_update(self, _: Any, key: Any, value: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        super().do_kv_cache_update(_, key + 1, value, cache, slots)


class Forgetful(PackedLayer):
    def do_kv_cache_update(self, _: Any, key: Any, value: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        super().do_kv_cache_update(_, key, value, cache, slots[:-1])


@pytest.mark.parametrize("kind", [Rounding, Forgetful])
def test_a_layout_that_cannot_be_read_is_an_error(kind: type[PackedLayer]) -> None:
    layer = kind(torch.arange(24), (3, 2, 2), blocks=2, dtype=torch.float32)
    with pytest.raises(EngineError, match="does not hold what was written"):
        BlockLayout.find(layer)


class PackedBytes(PackedLayer):
    """One that keeps 8 bits of each number, divided by a scale and cut, as vLLM's kernels for CPUs do."""

    def __init__(self, order: torch.Tensor, shape: tuple[int, int, int], *, name: str, scales: tuple[float, float]):
        super().__init__(order, shape, blocks=4, dtype=torch.uint8)
        self.kv_cache_dtype, (self._k_scale_float, self._v_scale_float) = name, scales

    def do_kv_cache_update(self, _: Any, key: Any, value: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        dtype = stored_dtype(self)
        assert dtype is not None
        pair = key / self._k_scale_float, value / self._v_scale_float
        super().do_kv_cache_update(_, *(cut(p.float(), dtype).view(torch.uint8) for p in pair), cache, slots)


def cut(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded towards zero."""
    nearest = numbers.to(dtype)
    beyond = nearest.float().abs() > numbers.abs()
    return torch.where(beyond, nearest.view(torch.uint8) - 1, nearest.view(torch.uint8)).view(dtype)


@given(st.data(), st.sampled_from(["fp8", "fp8_e4m3", "fp8_e5m2"]), st.tuples(*[st.floats(0.01, 30.0)] * 2))
def test_a_cache_of_bytes_is_read_with_its_scales(data: st.DataObject, name: str, scales: tuple[float, float]) -> None:
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)))
    layer = PackedBytes(torch.randperm(2 * math.prod(shape)), shape, name=name, scales=scales)
    rows = torch.randn(2, shape[0], *shape[1:], generator=torch.Generator().manual_seed(1))
    layer.do_kv_cache_update(layer, *rows, layer.kv_cache, torch.arange(shape[0]))
    _, found = CacheReader().read(layer, torch.arange(4), shape[0])
    dtype = stored_dtype(layer)
    assert dtype is not None
    for kept, row, scale in zip(found, rows, scales, strict=True):
        assert torch.equal(kept, cut(row / scale, dtype).float() * scale)


@pytest.mark.parametrize("name", ["nvfp4", ""])
def test_a_cache_of_bytes_in_a_format_that_is_not_known_is_not_read(name: str) -> None:
    layer = PackedBytes(torch.arange(24), (3, 2, 2), name=name, scales=(1.0, 1.0))
    with pytest.raises(EngineError, match="uint8"):
        BlockLayout.find(layer)


def test_behind_a_window_only_what_is_sure_is_read() -> None:
    layer = PackedLayer(torch.arange(24), (3, 2, 2), blocks=4, dtype=torch.float32)
    layer.sliding_window = 4  # type: ignore[attr-defined]
    start, (keys, _) = CacheReader().read(layer, torch.arange(4), 11)
    assert (start, len(keys)) == (7, 4)


@pytest.fixture(scope="module")
def gemma() -> Iterator[HFEngine]:
    engine = HFEngine(str(tiny_model("gemma2", num_hidden_layers=2)))
    engine.open()
    yield engine
    engine.close()


def test_transformers_shows_every_row_that_it_caches(gemma: HFEngine, tmp_path: Path) -> None:
    """Against the model's own cache, which keeps only the window of its sliding layer."""
    case = Case(id="a", tokens=TOKENS, new_tokens=3, forced=(5, 6))
    capture = gemma.run([case], points=Selection(), out=tmp_path / "a")
    with torch.no_grad():
        ids = torch.tensor([[*TOKENS, 5, 6]])
        cache = gemma._model(input_ids=ids, use_cache=True).past_key_values
    for number, layer in enumerate(cache.layers):
        for port, held in zip(CACHE_PORTS, (layer.keys, layer.values), strict=True):
            shown = whole(capture, f"model.layers.{number}.self_attn#{port}")
            assert shown.shape == (42, 2, 32)
            torch.testing.assert_close(shown[-held.shape[2] :], held[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert cache.layers[0].keys.shape[2] < 42 == cache.layers[1].keys.shape[2]
    order, attention = list(capture), "model.layers.1.self_attn"
    wanted = [f"{attention}.v_proj", *(f"{attention}#{p}" for p in CACHE_PORTS), f"{attention}.o_proj#input", attention]
    assert sorted(wanted, key=order.index) == wanted


@pytest.mark.parametrize("name", ["gpt_neox", "bloom", "falcon", "gptj", "codegen"])
def test_a_cache_is_seen_whatever_a_model_calls_it(name: str, tmp_path: Path) -> None:
    """These hand it on as ``layer_past``, and make it themselves on the first step."""
    engine = HFEngine(str(drawn_model(name)))
    engine.open()
    capture = engine.run(
        [Case(id="a", tokens=TOKENS[:7], new_tokens=3)], points=Selection(["*_cache"]), out=tmp_path / "a"
    )
    engine.close()
    assert len(list(capture)) >= 4
    assert {len(whole(capture, key)) for key in capture} == {9}


def whole(capture: Capture, key: str) -> torch.Tensor:
    point = capture.point(key)
    return torch.cat([capture.read(p) for p in point.pieces])


def test_padding_is_not_shown(tmp_path: Path) -> None:
    cases = [Case(id="long", tokens=TOKENS, new_tokens=3), Case(id="short", tokens=TOKENS[:7], new_tokens=2)]
    captures = []
    for padding in ("none", "left"):
        engine = HFEngine(str(tiny_model("qwen2", num_hidden_layers=2)), padding=padding)
        engine.open()
        captures.append(engine.run(cases, points=Selection(["*_cache"]), out=tmp_path / padding))
        engine.close()
    results = compare_captures(*captures, checks=["modules"])
    assert results.summary.verdict == "pass"
    assert {f.point.rpartition("#")[2] for f in results.findings} == set(CACHE_PORTS)


def test_an_engine_without_cache_points_loses_nothing() -> None:
    ours, theirs = manifest({KEY: [2, 4], "attn": 8, "attn.o": 8}), manifest({"attn": 8, "attn.o": 8})
    mapping = build_mapping(ours, theirs)
    assert [(u.point, u.reason) for u in mapping.skipped] == [(KEY, NO_CACHE)]
    assert not mapping.unmatched


def test_shards_of_kv_heads_are_joined() -> None:
    mapping = build_mapping(manifest({KEY: [4, 8]}), manifest({KEY: [2, 8]}, ranks=2))
    assert [(b.rank, b.length) for b in mapping.rules[0].blocks] == [(0, 16), (1, 16)]


@pytest.mark.parametrize(
    ("first", "window", "verdict"),
    [(0, 0, "pass"), (6, 4, "pass"), (6, 5, "error"), (7, 4, "error"), (6, 0, "error"), (0, 4, "pass")],
)
def test_a_tail_is_enough_behind_a_window_and_nowhere_else(
    tmp_path: Path, first: int, window: int, verdict: str
) -> None:
    rows = torch.arange(20.0).view(10, 1, 2) + 1
    case = Case(id="a", tokens=tuple(range(10)))
    reference = write_capture(tmp_path / "r", [([Segment(0, 0, 10)], {KEY: rows})], cases=[case])
    steps = [([Segment(0, first, 10 - first)], {KEY: rows[first:]})]
    facts = {"windows": {"attn": window}} if window else {}
    candidate = write_capture(tmp_path / "c", steps, cases=[case], facts=facts)
    results = compare_captures(reference, candidate, checks=["modules"])
    assert [f.verdict for f in results.findings] == [verdict]


def test_what_reads_a_wrong_cache_inherits_from_it() -> None:
    keys = ["attn.k", KEY, VALUE, "attn.o#input", "attn.o", "attn"]
    graph = Graph(manifest(dict.fromkeys(keys, 4), sources={"attn": "attn.o"}))

    def origins(*failing: str) -> dict[str, str | None]:
        found = [finding(k, "fail" if k in failing else "pass", order=graph.order(k)) for k in keys]
        return {f.point: f.origin for f in locate(found, graph) if f.verdict == "fail"}

    assert origins(KEY, "attn.o#input", "attn.o", "attn") == {
        KEY: "introduced",
        "attn.o#input": "inherited",
        "attn.o": "inherited",
        "attn": "inherited",
    }
    assert origins("attn.k", KEY) == {"attn.k": "introduced", KEY: "inherited"}
    assert origins(KEY, VALUE) == {KEY: "introduced", VALUE: "introduced"}
    assert origins("attn.o#input") == {"attn.o#input": "introduced"}
    assert graph.blame(KEY) == graph.blame("attn.o#input") == "attn"


def test_layers_that_share_or_compress_are_left_alone() -> None:
    plain = PackedLayer(torch.arange(24), (3, 2, 2), blocks=1, dtype=torch.float32)
    shared = PackedLayer(torch.arange(24), (3, 2, 2), blocks=1, dtype=torch.float32)
    shared.kv_sharing_target_layer_name = "plain"  # type: ignore[attr-defined]
    latent = PackedLayer(torch.arange(24), (3, 2, 2), blocks=1, dtype=torch.float32)
    latent.kv_lora_rank = 4  # type: ignore[attr-defined]
    layers = {"plain": plain, "shared": shared, "latent": latent, "idle": plain}
    context = SimpleNamespace(no_compile_layers=layers, attn_metadata=dict.fromkeys(["plain", "shared", "latent"]))
    assert list(CacheReader().layers(context)) == ["plain"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reference_that_caches_every_kv_head_for_each_query_head(tmp_path: Path, ranks: int) -> None:
    """Two kv heads, four query heads; the candidate keeps each kv head once."""
    own = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    case = Case(id="a", tokens=(1, 2, 3))
    segments = [Segment(0, 0, 3)]
    reference = write_capture(
        tmp_path / "r", [(segments, {KEY: own.repeat_interleave(2, dim=1), VALUE: own.repeat(1, 2, 1)})], cases=[case]
    )
    shards = [[(segments, {KEY: part, VALUE: part})] for part in own.chunk(ranks, dim=1)]
    candidate = write_capture(tmp_path / "c", *shards, cases=[case])
    results = compare_captures(reference, candidate, checks=["modules"])
    assert {f.point: f.verdict for f in results.findings} == {KEY: "pass", VALUE: "fail"}


def test_cache_rows_that_fit_in_no_way_are_a_misfit() -> None:
    """A latent of MLA may be as wide as all heads together: it is none of them."""
    for theirs in ([2, 8], [1, 16], [3, 4], [8], [16], [4, 4]):
        mapping = build_mapping(manifest({KEY: [4, 4]}), manifest({KEY: theirs}))
        assert [m.reference for m in mapping.misfits] == ([] if theirs in ([16], [4, 4]) else [KEY])
        assert all("heads x width 4 x 4 against" in m.message for m in mapping.misfits)


def test_the_first_wrong_cache_introduced_it(tmp_path: Path) -> None:
    keys = [f"{n}.attn#{port}" for n in (0, 1, 2) for port in CACHE_PORTS]
    rows = {k: torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(n)) for n, k in enumerate(keys)}
    wrong = {k: t + (0.5 if k[0] != "0" else 0.0) for k, t in rows.items()}
    case = Case(id="a", tokens=(1, 2, 3))
    ours, theirs = (
        write_capture(tmp_path / name, [([Segment(0, 0, 3)], tensors)], cases=[case])
        for name, tensors in (("ours", rows), ("theirs", wrong))
    )
    subject = Subject(reference=ours, candidate=theirs, mapping=build_mapping(ours.manifest, theirs.manifest))
    origins = {f.point: f.origin for f in cached(subject, "a", check="kv_cache")}
    assert origins == {k: {"0": None, "1": "introduced", "2": "inherited"}[k[0]] for k in keys}
