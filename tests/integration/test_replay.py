"""Replay with nano: every fault is the only culprit, several are all named, and a right engine has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paritykit as pk
from paritykit.captures.feed import FedPoint, Feed, Fill
from paritykit.captures.recorder import Selection
from paritykit.checks.base import Subject
from paritykit.checks.measured import measure_point
from paritykit.config import load_config
from paritykit.diagnose.tree import Tree
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.errors import EngineError, UsageError
from paritykit.mapping.build import build_mapping
from paritykit.mapping.feeding import can_feed, make_feed
from paritykit.replays import with_neighbours
from paritykit.session import Session
from paritykit.testing import tiny_model
from paritykit.testing.faults import FAULTS, Fault, find
from tests.causes import strength_of
from tests.faulty import VOCABULARY, Ground, Trial, homes, model_of
from tests.nano import one_thread
from tests.replayed import Planted, explained, named, places

CASES = [
    pk.Case(id="a", tokens=tuple(range(3, 40)), new_tokens=3),
    pk.Case(id="b", tokens=(7, 9, 400), new_tokens=4),
    pk.Case(id="c", tokens=(11, 12), batch=1),
]
HEAD = 32
"""Elements of a head in the tiny models."""
SHOWN_BY_NO_POINT = ("batch-rows-mixed-up",)
EVERYWHERE = ("kv-scale-unread",)
"""Its condition, a cache in fp8, is beyond float32's tolerance in every layer by itself."""
IN_CI = {
    "rope-theta": "qwen2", "norm-eps": "gemma2", "gate-up-swapped": "gemma3", "residual-dropped": "mistral",
    "embedding-scale-missing": "gemma3", "experts-scale": "mixtral", "head-permuted": "qwen2",
    "logits-scaled": "gemma2", "position-shift-in-decode": "qwen2",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    found = Ground(tmp_path_factory.mktemp("captures"))
    yield found
    found.close()


def each() -> list[Any]:
    live = [f for _, f in FAULTS.items() if f.stage == "live" and f.name not in (*EVERYWHERE, *SHOWN_BY_NO_POINT)]
    return [
        pytest.param(f, name, id=f"{f.name}-{name}", marks=[] if IN_CI.get(f.name) == name else [pytest.mark.deep])
        for f in live
        for name in homes(f)
    ]


@pytest.mark.parametrize(("fault", "name"), each())
def test_a_fault_is_the_only_culprit(ground: Ground, fault: Fault, name: str) -> None:
    trial = Trial(ground, fault, name, homes(fault)[name])
    found = explained(ground, trial.engine, trial.reference, trial.cases, [(fault.name, trial.layer)])
    assert named(found) == (set() if fault.kind == "null" else places(fault, trial.layer))
    for f in found:
        assert f.local is None or f.local.verdict != "error", f.local
        if f.local is not None and f.local.culprit:
            assert f.local.value is None or f.local.value > (f.local.allowed or 0)
            assert f.origin == ("introduced" if f.verdict == "fail" else None)


NEAR = [
    ("norm-offset-added", "qwen2"),
    ("rope-pairing", "gemma3"),
    ("residual-dropped", "mistral"),
    ("experts-scale", "mixtral"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "name"), [pytest.param(*n, marks=[] if n == NEAR[0] else [pytest.mark.deep]) for n in NEAR]
)
def test_beside_a_floor_what_is_ten_times_as_large_is_the_only_culprit(
    tmp_path: Path, fault: str, name: str, dtype: str
) -> None:
    """In float32 that is within the fallback table's number; modules that are right stay so."""
    ground = Ground(tmp_path, dtype=dtype, floor=True)
    trial = Trial(ground, find(fault), name, 1)
    twin = ground.twin(trial.model, trial.cases)
    strength = strength_of(trial, times=10.0)
    assert strength
    found = explained(
        ground, trial.engine, trial.reference, trial.cases, [(fault, trial.layer)], twin=twin, strength=strength
    )
    assert named(found) == places(fault, trial.layer)
    assert named(explained(ground, trial.engine, trial.reference, trial.cases, twin=twin)) == set()


def follow(ground: Ground, model: Path) -> tuple[pk.Capture, list[pk.Case]]:
    reference = ground.reference(model, CASES)
    return reference, [c.force(reference.generated(c.id)) for c in CASES]


SEVERAL: dict[str, tuple[str, list[Planted]]] = {
    "three layers": ("qwen2", [("norm-eps", 0), ("rope-theta", 1), ("gate-up-swapped", 2)]),
    "one block": ("qwen2", [("bias-missing", 1), ("rope-theta", 1)]),
    "one layer": ("gemma2", [("norm-eps", 1), ("attention-scale", 1), ("norm-after-mlp-skipped", 1)]),
    "both ends": ("mistral", [("embedding-rows-shifted", 0), ("attention-scale", 2), ("head-permuted", 0)]),
    "experts": ("mixtral", [("experts-scale", 0), ("experts-swapped", 1), ("residual-dropped-after-mlp", 2)]),
}
SEVERAL_IN_CI = [("alone", name) for name in ("three layers", "one block", "experts")]
PARALLEL: dict[str, dict[str, Any]] = {
    "alone": {"max_num_batched_tokens": 16},
    "two ranks": {"tensor_parallel_size": 2},
    "two stages": {"pipeline_parallel_size": 2},
    "both": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}


def several() -> list[Any]:
    deep = [pytest.mark.deep]
    return [
        pytest.param(faults, way, id=f"{faults}, {way}", marks=[] if (way, faults) in SEVERAL_IN_CI else deep)
        for way in PARALLEL
        for faults in SEVERAL
    ]


@pytest.mark.parametrize(("faults", "way"), several())
def test_several_faults_are_all_named(ground: Ground, faults: str, way: str) -> None:
    name, planted = SEVERAL[faults]
    model = model_of(name)
    reference, cases = follow(ground, model)
    engine = ground.engine(model, **PARALLEL[way])
    found = explained(ground, engine, reference, cases, planted)
    assert named(found) == set().union(*(places(*p) for p in planted))
    assert named(explained(ground, engine, reference, cases)) == set()
    introduced = {f.located for f in found if f.origin == "introduced"}
    assert introduced == named(found)


def test_a_bad_reference_leaves_the_right_modules_in_peace(ground: Ground, tmp_path: Path) -> None:
    """Everything after the reference's own mistake differs, and nothing of it is wrong."""
    model = model_of("qwen2")
    engine = HFEngine(str(model))
    engine.open()
    engine._model.model.layers[1].self_attn.v_proj.bias.data += 1
    reference = engine.run(CASES, points=Selection(), out=tmp_path / "bad")
    cases = [c.force(reference.generated(c.id)) for c in CASES]
    found = explained(ground, ground.engine(model), reference, cases)
    assert sum(f.verdict == "fail" for f in found) > 60
    assert named(found) == {"model.layers.1.self_attn.v_proj"}
    last = next(f for f in found if (f.case, f.point) == ("a", "model.layers.2"))
    assert (last.verdict, last.origin) == ("fail", "inherited")
    assert last.local is not None
    assert (last.local.verdict, last.local.level) == ("pass", "layers")


ATTENTION = "model.layers.1.self_attn"
EXPERTS = "model.layers.1.mlp.experts"
PARTS: dict[str, tuple[str, str, str, slice, list[str]]] = {
    "heads": ("qwen2", f"{ATTENTION}.q_proj", "bias", slice(HEAD, 2 * HEAD), ["head 1 of 4"]),
    "elements": ("qwen3", f"{ATTENTION}.k_norm", "weight", slice(4), ["elements 0-3 of 32 of each head"]),
    "experts": ("mixtral", EXPERTS, "down_proj", slice(2, 3), ["expert 2 of 4"]),
    "features": ("qwen2", "lm_head", "weight", slice(100, 132), ["features 100-131 of 499"]),
    "ranks": ("qwen2", f"{ATTENTION}.v_proj", "bias", slice(HEAD, 2 * HEAD), ["rank 1 of 2", "head 1 of 2"]),
    "all": ("qwen2", "model.layers.1.mlp.down_proj", "weight", slice(None), []),
}
"""The model, the culprit, what is spoilt of which parameter of it, and which part of what it gives is wrong then."""


@pytest.mark.parametrize("name", PARTS)
def test_a_culprit_says_which_part_of_it_is_wrong(ground: Ground, tmp_path: Path, name: str) -> None:
    family, culprit, parameter, part, wanted = PARTS[name]
    model = model_of(family)
    spoilt = HFEngine(str(model))
    spoilt.open()
    spoilt._model.get_parameter(f"{culprit}.{parameter}").data[part] += 0.5
    reference = spoilt.run(CASES, points=Selection(), out=tmp_path / "bad")
    cases = [c.force(reference.generated(c.id)) for c in CASES]
    engine = ground.engine(model, tensor_parallel_size=2 if name == "ranks" else 1)
    found = explained(ground, engine, reference, cases)
    first = next(f for f in found if f.local is not None and f.local.culprit and f.case == "a")
    assert first.located == culprit
    assert [s.describe() for s in first.slices] == wanted
    assert not any(f.slices for f in found if f.local is None or not f.local.culprit)


def layers_to_leaves(manifest: Any) -> Iterator[set[str]]:
    """The modules that are looked at on each level, where all is looked into."""
    tree = Tree(manifest)
    modules = tree.top
    while modules:
        yield set(modules)
        modules = [inner for m in modules for inner in tree.inside(m)]


workloads = st.lists(
    st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=5, max_size=24), st.integers(0, 3), st.integers(0, 1)),
    min_size=1,
    max_size=3,
).map(
    lambda drawn: [pk.Case(id=f"c{n}", tokens=tuple(t), new_tokens=new, batch=b) for n, (t, new, b) in enumerate(drawn)]
)


@given(cases=workloads, name=st.sampled_from(["qwen2", "gemma3", "mixtral"]), data=st.data())
@settings(deadline=None, max_examples=5)
def test_a_right_engine_gives_what_the_reference_gives_on_every_level(
    ground: Ground, cases: list[pk.Case], name: str, data: st.DataObject
) -> None:
    """However it is batched and cut into chunks, and whatever of it is fed."""
    model = model_of(name)
    reference = ground.reference(model, cases)
    engine = ground.engine(model, max_num_batched_tokens=data.draw(st.sampled_from([5, 64])))
    fed = [c.force(reference.generated(c.id)) for c in cases]
    free = ground.run(engine, fed)
    mapping = build_mapping(reference.manifest, free.manifest)
    replaced: list[Any] = []
    for modules in layers_to_leaves(reference.manifest):
        replaced += [r for r in mapping.rules if r.reference.partition("#")[0] in modules and can_feed(r)]
        feed = make_feed(replaced, reference=reference.manifest, folder=reference.path, candidate=free.manifest)
        again = engine.run(fed, points=Selection(), out=ground.folder / f"fed{next(ground.numbers)}", feed=feed)
        assert set(again.manifest.facts["fed"]) == {r.candidate for r in replaced}
        subject = Subject(reference=reference, candidate=again, mapping=mapping)
        for rule in mapping.rules:
            for case in cases:
                found = measure_point(subject, rule, case.id, check="replay", depth=0)
                assert found.verdict == "pass", (rule, found)


def test_fed_with_itself_an_engine_changes_no_bit(ground: Ground) -> None:
    engine = ground.engine(model_of("qwen2"))
    mine = ground.run(engine, CASES)
    mapping = build_mapping(mine.manifest, mine.manifest)
    rules = [r for r in mapping.rules if can_feed(r)]
    feed = make_feed(rules, reference=mine.manifest, folder=mine.path, candidate=mine.manifest)
    again = engine.run(CASES, points=Selection(), out=ground.folder / "itself", feed=feed)
    assert set(again.manifest.facts["fed"]) == {r.candidate for r in rules}
    for key in mine.points:
        for case in mine.cases:
            assert torch.equal(mine.rows(key, case), again.rows(key, case)), key
    assert mine.manifest.generated == again.manifest.generated


def test_a_feed_that_does_not_fit_stops_the_run_and_not_the_engine(ground: Ground, tmp_path: Path) -> None:
    engine = ground.engine(model_of("qwen2"))
    mine = ground.run(engine, CASES)

    def attempt(point: str, fill: Fill, name: str) -> pk.Capture:
        feed = Feed(str(mine.path), (FedPoint(point, 0, (fill,)),))
        found: pk.Capture = engine.run(CASES, points=Selection(["model.norm"]), out=tmp_path / name, feed=feed)
        return found

    with pytest.raises(UsageError, match="cannot be fed columns"):
        attempt("model.norm", Fill("model.norm", 100, 0, 100), "one")
    with pytest.raises(EngineError, match=r"recording on rank 0 of nano failed: .*model\.norm: rows of"):
        attempt("model.norm", Fill("lm_head", 0, 0, 400), "two")
    assert not list(tmp_path.iterdir())
    assert attempt("model.norm", Fill("model.norm", 0, 0, 128), "three").manifest.facts["fed"] == ["model.norm"]
    assert attempt("no.such.module", Fill("model.norm", 0, 0, 128), "four").manifest.facts["fed"] == []
    assert torch.equal(ground.run(engine, CASES).rows("#logits", "a"), mine.rows("#logits", "a"))


def test_cases_of_one_batch_stay_together(ground: Ground) -> None:
    capture = ground.run(ground.engine(model_of("qwen2")), CASES)
    assert [c.id for c in with_neighbours(capture, ["b"])] == ["a", "b"]
    assert [c.id for c in with_neighbours(capture, ["c"])] == ["c"]


class Counted(NanoEngine):
    """Counts its runs; those that are fed may be made to fail."""

    capabilities = NanoEngine.capabilities
    runs = 0
    broken = False

    def run(self, *args: Any, **kwargs: Any) -> pk.Capture:
        self.runs += 1
        if self.broken and kwargs.get("feed") is not None:
            raise EngineError("a rank died of old age")
        return super().run(*args, **kwargs)


def session(fault: str, **options: Any) -> tuple[Session, Counted]:
    model = str(tiny_model("qwen2", num_hidden_layers=3))
    engine = Counted(model, provenance=False, **find(fault).arguments(layer=1))
    config = load_config({}, environ={})
    cases = list(CASES)
    return Session(reference=HFEngine(model), candidate=engine, cases=cases, config=config, **options), engine


def test_a_session_replays_where_a_case_fails() -> None:
    opened, engine = session("rope-theta")
    with opened:
        results = opened.results(["modules", "logits"])
        assert engine.runs == 4
        assert [c.point for c in results.summary.culprits] == ["model.layers.1.self_attn"]
        assert results.summary.first_divergence == results.summary.culprits[0]
        again = opened.explained([f for f in results.findings if f.check == "logits"])
        assert engine.runs == 4
    assert all(f.local is not None for f in again if f.verdict == "fail")
    assert {f.origin for f in again if f.verdict == "fail"} == {"inherited"}


def test_a_session_replays_nothing_where_all_is_well_or_nobody_asked() -> None:
    for fault, options, runs in (("null-forward", {}, 1), ("rope-theta", {"explain": False}, 1)):
        opened, engine = session(fault, **options)
        with opened:
            results = opened.results(["modules", "logits"])
        assert engine.runs == runs
        assert results.summary.culprits == []
        assert not any(f.local for f in results.findings)


def test_a_replay_that_fails_takes_nothing_with_it() -> None:
    opened, engine = session("rope-theta")
    engine.broken = True
    with opened:
        results = opened.results(["modules"])
    first = results.summary.first_divergence
    assert first is not None
    assert (results.summary.verdict, first.point) == ("fail", "model.layers.1.self_attn")
    told = [f.local for f in results.findings if f.local is not None]
    assert [(t.verdict, t.message) for t in told] == [("error", "a rank died of old age")]


def test_an_engine_that_cannot_replay_is_left_alone() -> None:
    opened, engine = session("rope-theta")
    engine.capabilities = engine.capabilities - {"replay"}
    with opened:
        results = opened.results(["modules"])
    assert engine.runs == 1
    assert results.summary.verdict == "fail"
