"""Rules from what engines declare: fused parts, renamed containers, tied heads, other meanings, several ranks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.captures.manifest import Dropped
from paritykit.errors import UsageError
from paritykit.mapping.build import Mapping, build_mapping
from paritykit.mapping.rules import Block, Rule
from tests.made import manifest

LAYER = "model.layers.0"
QKV = {
    f"{LAYER}.self_attn.qkv_proj": [
        {"total": 8, "local": 8, "replicas": 1},
        {"total": 4, "local": 4, "replicas": 1},
        {"total": 4, "local": 4, "replicas": 1},
    ],
    f"{LAYER}.mlp.gate_up_proj": [{"total": 6, "local": 6, "replicas": 1}] * 2,
}
ATTENTION = {f"{LAYER}.self_attn.{n}_proj": w for n, w in (("q", 8), ("k", 4), ("v", 4))}
MLP = {f"{LAYER}.mlp.gate_proj": 6, f"{LAYER}.mlp.up_proj": 6}
NAMES: dict[str, Any] = {
    **{f"{LAYER}.self_attn.{n}_proj.weight": (f"{LAYER}.self_attn.qkv_proj.weight", n) for n in "qkv"},
    **{f"{LAYER}.self_attn.{n}_proj.bias": (f"{LAYER}.self_attn.qkv_proj.bias", n) for n in "qkv"},
    f"{LAYER}.mlp.gate_proj.weight": (f"{LAYER}.mlp.gate_up_proj.weight", "0"),
    f"{LAYER}.mlp.up_proj.weight": (f"{LAYER}.mlp.gate_up_proj.weight", "1"),
}
FUSED = {f"{LAYER}.self_attn.qkv_proj": 16, f"{LAYER}.mlp.gate_up_proj": 12}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
WANTED = {
    f"{LAYER}.self_attn.q_proj": (Block(0, 0, 8),),
    f"{LAYER}.self_attn.k_proj": (Block(0, 8, 4),),
    f"{LAYER}.self_attn.v_proj": (Block(0, 12, 4),),
    f"{LAYER}.mlp.gate_proj": (Block(0, 0, 6),),
    f"{LAYER}.mlp.up_proj": (Block(0, 6, 6),),
}


def build(ours: dict[str, Any], theirs: dict[str, Any], *, ranks: int = 1, **sides: dict[str, Any]) -> Mapping:
    reference = manifest(ours, facts=sides.get("reference"), sources=sides.get("sources"))
    return build_mapping(reference, manifest(theirs, facts=sides.get("candidate"), ranks=ranks))


def rules(mapping: Mapping) -> dict[str, Rule]:
    return {r.reference: r for r in mapping.rules}


def blocks(mapping: Mapping) -> dict[str, tuple[Block, ...]]:
    return {r.reference: r.blocks for r in mapping.rules}


def identity(names: dict[str, Any]) -> dict[str, str]:
    return {n: n for n in names}


@pytest.mark.parametrize(("facts", "source"), [
    ({"names": NAMES, "fused": QKV}, "declared loading rules"),
    ({"names": {n: (n, "") for n in NAMES}, "fused": QKV, "packed": PACKED},
     "packed_modules_mapping"),
])  # fmt: skip
def test_fused_parts(facts: dict[str, Any], source: str) -> None:
    mapping = build({**ATTENTION, **MLP}, FUSED, reference={"parameters": identity(NAMES)}, candidate=facts)
    assert blocks(mapping) == WANTED
    assert {r.source for r in mapping.rules} == {source}
    assert not mapping.unmatched
    assert not mapping.skipped
    assert not mapping.misfits


def test_what_the_reference_was_not_recorded_at_has_that_reason() -> None:
    """It runs over what was cached, say, and not token by token."""
    reference = manifest({f"{LAYER}.mlp": 4})
    reference.dropped.append(Dropped(f"{LAYER}.self_attn.kv_b_proj", "its rows changed"))
    theirs = manifest({f"{LAYER}.mlp": 4, f"{LAYER}.self_attn.kv_b_proj": 4})
    mapping = build_mapping(reference, theirs)
    assert not mapping.unmatched
    assert [u.reason for u in mapping.skipped] == ["the reference was not recorded there: its rows changed"]


def test_fused_parts_of_two_ranks_with_a_shared_kv_head() -> None:
    fused = {
        f"{LAYER}.self_attn.qkv_proj": [
            {"total": 8, "local": 4, "replicas": 1},
            {"total": 4, "local": 4, "replicas": 2},
            {"total": 4, "local": 4, "replicas": 2},
        ]
    }
    mapping = build(
        ATTENTION,
        {f"{LAYER}.self_attn.qkv_proj": 12},
        ranks=2,
        reference={"parameters": identity(NAMES)},
        candidate={"names": NAMES, "fused": fused},
    )
    assert blocks(mapping) == {
        f"{LAYER}.self_attn.q_proj": (Block(0, 0, 4), Block(1, 0, 4)),
        f"{LAYER}.self_attn.k_proj": (Block(0, 4, 4),),
        f"{LAYER}.self_attn.v_proj": (Block(0, 8, 4),),
    }


def test_a_module_that_both_sides_fuse() -> None:
    """Phi-3's own checkpoint is fused: all of it, in one rank and in two."""
    key = f"{LAYER}.self_attn.qkv_proj"
    facts = {"parameters": {f"{key}.weight": f"{key}.weight"}}
    names = {f"{key}.weight": (f"{key}.weight", "")}
    one = build({key: 16}, {key: 16}, reference=facts, candidate={"names": names, "fused": QKV})
    assert blocks(one) == {key: ()}
    halves = [{"total": t, "local": t // 2, "replicas": 1} for t in (8, 4, 4)]
    two = build({key: 16}, {key: 8}, ranks=2, reference=facts, candidate={"names": names, "fused": {key: halves}})
    assert [(b.rank, b.start) for b in blocks(two)[key]] == [(0, 0), (1, 0), (0, 4), (1, 4), (0, 6), (1, 6)]


def test_renamed_containers_follow_their_parts() -> None:
    """Mixtral: ``mlp`` is ``block_sparse_moe`` on the other side; its router has weights, its activation has none."""
    ours = {f"{LAYER}.mlp.gate": 4, f"{LAYER}.mlp.act_fn": 8, f"{LAYER}.mlp.experts": 8, f"{LAYER}.mlp": 8, LAYER: 8}
    theirs = {f"{LAYER}.block_sparse_moe.gate": 4, f"{LAYER}.block_sparse_moe.experts": 8}
    theirs |= {f"{LAYER}.block_sparse_moe": 8, LAYER: 8}
    moe = f"{LAYER}.block_sparse_moe"
    names = {
        f"{moe}.gate.weight": (f"{moe}.gate.weight", ""),
        f"{moe}.experts.0.w1.weight": (f"{moe}.experts.w13_weight", ""),
    }
    parameters = {
        f"{moe}.gate.weight": f"{LAYER}.mlp.gate.weight",
        f"{moe}.experts.0.w1.weight": f"{LAYER}.mlp.experts.gate_up_proj",
    }
    mapping = build(ours, theirs, reference={"parameters": parameters}, candidate={"names": names})
    assert {k: r.candidate for k, r in rules(mapping).items()} == {
        f"{LAYER}.mlp.gate": f"{moe}.gate",
        f"{LAYER}.mlp.experts": f"{moe}.experts",
        f"{LAYER}.mlp": moe,
        LAYER: LAYER,
    }
    assert [(u.point, u.reason) for u in mapping.skipped] == [
        (
            f"{LAYER}.mlp.act_fn",
            f"no candidate module of this name; it has no weights, and shows at {LAYER}.mlp.experts",
        )
    ]
    assert not mapping.unmatched


def test_a_module_that_takes_several_parts_is_all_of_them() -> None:
    """The reference fuses what its checkpoint keeps apart, as newer experts do."""
    ours = f"{LAYER}.mlp.gate_up"
    parameters = {f"{LAYER}.mlp.{n}_proj.weight": f"{ours}.weight" for n in ("gate", "up")}
    mapping = build({ours: 12}, FUSED, reference={"parameters": parameters}, candidate={"names": NAMES, "fused": QKV})
    assert blocks(mapping) == {ours: ()}
    assert rules(mapping)[ours].candidate == f"{LAYER}.mlp.gate_up_proj"


def test_a_part_that_nobody_knows_is_unmatched_and_no_crash() -> None:
    """Shard names other than q, k, v and numbers (``w1``, or several parts at once) say nothing about columns."""
    for shard in ("w1", "(0, 1)", "qk", "-1", "²"):
        names = {f"{LAYER}.mlp.gate_proj.weight": (f"{LAYER}.mlp.gate_up_proj.weight", shard)}
        mapping = build(
            {f"{LAYER}.mlp.gate_proj": 6},
            {f"{LAYER}.mlp.gate_up_proj": 12},
            reference={"parameters": identity(names)},
            candidate={"names": names, "fused": QKV},
        )
        assert [u.point for u in mapping.unmatched] == [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.gate_up_proj"]
        assert not mapping.rules
        assert not mapping.misfits


def test_a_part_that_the_fused_module_does_not_have_is_a_misfit() -> None:
    names = {f"{LAYER}.mlp.gate_proj.weight": (f"{LAYER}.mlp.gate_up_proj.weight", "2")}
    mapping = build(
        {f"{LAYER}.mlp.gate_proj": 6},
        FUSED,
        reference={"parameters": identity(names)},
        candidate={"names": names, "fused": QKV},
    )
    assert [m.reference for m in mapping.misfits] == [f"{LAYER}.mlp.gate_proj"]


def test_a_tied_head_has_its_place() -> None:
    ours, theirs = {"model.norm": 4, "lm_head": 9, "#logits": 9}, {"model.norm": 4, "head": 9, "#logits": 9}
    mapping = build(ours, theirs, reference={"head": "lm_head"}, candidate={"head": "head"})
    assert rules(mapping)["lm_head"].candidate == "head"
    assert rules(mapping)["#logits"].candidate == "#logits"


def test_meanings_keep_points_apart_with_their_reason() -> None:
    ours = {f"{LAYER}.mlp.act_fn": 6, "model.rotary_emb": 4, "model.norm": 8}
    theirs = {f"{LAYER}.mlp.act_fn": 6, "model.rotary_emb": 4, "model.norm": 8}
    mapping = build(
        ours,
        theirs,
        reference={"meanings": {"model.rotary_emb": "tables"}},
        candidate={"meanings": {f"{LAYER}.mlp.act_fn": "multiplies"}},
    )
    assert list(rules(mapping)) == ["model.norm"]
    assert {(u.side, u.point, u.reason) for u in mapping.skipped} == {
        ("reference", f"{LAYER}.mlp.act_fn", "multiplies"),
        ("reference", "model.rotary_emb", "tables"),
        ("candidate", f"{LAYER}.mlp.act_fn", "multiplies"),
        ("candidate", "model.rotary_emb", "tables"),
    }


def test_the_same_tensor_under_another_name_is_no_loss() -> None:
    mapping = build({"model.a": 4, "model.b": 4}, {"model.a": 4}, sources={"model.b": "model.a"})
    assert [(u.point, u.reason) for u in mapping.skipped] == [
        ("model.b", "the same tensor as model.a, which is compared")
    ]


def test_weights_without_counterpart_are_a_loss() -> None:
    ours = {"model.a": 4, "model.b": 4}
    mapping = build(ours, {"model.b": 4}, reference={"parameters": {"model.a.weight": "model.a.weight"}})
    assert [(u.side, u.point) for u in mapping.unmatched] == [("reference", "model.a")]


def test_a_layer_with_a_longer_number_does_not_excuse_a_missing_point() -> None:
    """Layer 10 does not lie in layer 1."""
    mapping = build({"model.layers.1.extra": 4, "model.layers.10.norm": 4}, {"model.layers.10.norm": 4})
    assert [u.point for u in mapping.unmatched] == ["model.layers.1.extra"]


def test_what_an_engine_could_not_record_is_said() -> None:
    reference = manifest({"model.a": 4})
    candidate = manifest({"model.b": 4}, facts={"modules": ["model.a"]})
    candidate.dropped.append(Dropped("model.a", "its shape [3] has no token axis"))
    mapping = build_mapping(reference, candidate)
    assert [u.reason for u in mapping.skipped] == ["its shape [3] has no token axis"]


@pytest.mark.parametrize(("wanted", "local", "ranks", "fits"), [
    (8, 8, 1, ()), (8, 8, 2, ()), (8, 4, 2, (Block(0, 0, 4), Block(1, 0, 4))),
    (8, 4, 4, (Block(0, 0, 4), Block(2, 0, 4))), (8, 4, 1, None), (8, 6, 2, None), (8, 16, 2, None),
])  # fmt: skip
def test_sizes_on_several_ranks(wanted: int, local: int, ranks: int, fits: tuple[Block, ...] | None) -> None:
    mapping = build({"m": wanted}, {"m": local}, ranks=ranks)
    if fits is None:
        assert [m.message for m in mapping.misfits] == [
            f"{wanted} features against {local} on each of {ranks} rank(s) of m"
        ]
    else:
        assert blocks(mapping) == {"m": fits}


def test_one_fused_part_of_another_size_is_a_misfit() -> None:
    fused = {"m": [{"total": 6, "local": 6, "replicas": 1}]}
    assert [m.reference for m in build({"m": 8}, {"m": 6}, candidate={"fused": fused}).misfits] == ["m"]


MODULES = [f"{top}.{n}.{leaf}" for top in ("a", "b") for n in range(2) for leaf in ("q", "k", "x")]
MODULES += ["a", "b", "a.0", "b.1", "head", "qk"]
WIDTHS = st.sampled_from([2, 4, 8])
POINTS = st.dictionaries(
    st.builds(lambda m, p: m + p, st.sampled_from(MODULES), st.sampled_from(["", "#input", "@1"])) | st.just("#logits"),
    WIDTHS,
    max_size=10,
)
TENSORS = st.sampled_from([f"{m}.weight" for m in MODULES])
FACTS = st.fixed_dictionaries(
    {},
    optional={
        "meanings": st.dictionaries(st.sampled_from(MODULES), st.just("other"), max_size=2),
        "head": st.sampled_from(["head", "a.0.q", ""]),
        "modules": st.lists(st.sampled_from(MODULES), max_size=5),
        "packed": st.just({"qk": ["q", "k"], "x": ["q"]}),
        "fused": st.dictionaries(
            st.sampled_from(MODULES),
            st.lists(st.just({"total": 4, "local": 2, "replicas": 1}), min_size=1, max_size=3),
            max_size=2,
        ),
        "names": st.dictionaries(
            TENSORS, st.none() | st.tuples(TENSORS, st.sampled_from(["", "q", "1", "w2"])), max_size=6
        ),
    },
)


@given(
    st.tuples(POINTS, FACTS), st.tuples(POINTS, FACTS), st.dictionaries(TENSORS, TENSORS, max_size=6), st.integers(1, 2)
)
@settings(deadline=None, max_examples=400)
def test_every_point_ends_in_one_place(
    left: tuple[dict[str, int], dict[str, Any]],
    right: tuple[dict[str, int], dict[str, Any]],
    parameters: dict[str, str],
    ranks: int,
) -> None:
    (ours, reference), (theirs, candidate) = left, right
    mapping = build(ours, theirs, ranks=ranks, reference={**reference, "parameters": parameters}, candidate=candidate)
    rest = [*mapping.skipped, *mapping.unmatched]
    ends = [r.reference for r in mapping.rules] + [m.reference for m in mapping.misfits]
    mine = ends + [u.point for u in rest if u.side == "reference"]
    assert len(mine) == len(set(mine))
    assert {k for k in ours if not k.endswith("#input")} <= set(mine) <= set(ours)
    assert [k for k in ours if k in rules(mapping)] == [r.reference for r in mapping.rules]
    used = {r.candidate for r in mapping.rules} | {m.candidate for m in mapping.misfits}
    others = [u.point for u in rest if u.side == "candidate"]
    assert not used & set(others)
    assert {k for k in theirs if not k.endswith("#input")} <= used | set(others)
    for rule in mapping.rules:
        width = sum(b.length for b in rule.blocks) if rule.blocks else theirs[rule.candidate]
        assert width == ours[rule.reference]
        assert all(b.start + b.length <= theirs[rule.candidate] and b.rank < ranks for b in rule.blocks)


def test_a_reference_on_several_ranks_is_refused() -> None:
    sharded = manifest({"a": 4}, ranks=2)
    side = msgspec.structs.replace(sharded.side, parallel={"tensor_parallel_size": 2})
    with pytest.raises(UsageError, match="2 tensor parallel ranks"):
        build_mapping(msgspec.structs.replace(sharded, side=side), manifest({"a": 8}))


def test_a_module_under_two_paths_is_found_under_the_one_it_was_recorded_as() -> None:
    facts = {"same": {"block.mlp.gate": "block.gate"}}
    assert {r.reference: r.candidate for r in build({"block.mlp.gate": 4}, {"block.gate": 4}).rules} == {}
    found = build({"block.mlp.gate": 4}, {"block.gate": 4}, candidate=facts)
    assert {r.reference: r.candidate for r in found.rules} == {"block.mlp.gate": "block.gate"}
    assert found.unmatched == []


def test_what_lies_in_a_compiled_graph_is_left_out_with_that_reason() -> None:
    """Where none is compiled, a module with weights that has no counterpart has no reason either."""
    parts = {"block.mlp.gate": 4, "block.mlp.act": 4, "head": 4}
    weighted = {"parameters": {"w": "block.mlp.gate.weight"}}
    found = build(parts, {"head": 4}, reference=weighted, candidate={"compiled": ["block"]})
    assert [r.reference for r in found.rules] == ["head"]
    assert {u.point: u.reason for u in found.skipped} == dict.fromkeys(
        ("block.mlp.gate", "block.mlp.act"), "hooks do not fire in the candidate's compiled graph (block)"
    )
    open_graph = build(parts, {"head": 4}, reference=weighted, candidate={"compiled": []})
    assert "block.mlp.gate" in [u.point for u in open_graph.unmatched]
