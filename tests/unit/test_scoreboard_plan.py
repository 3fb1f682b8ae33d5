"""The scoreboard's trials: nothing of the fault table is left out, and shards part them evenly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.engines.nano.config import NanoConfig
from paritykit.errors import UnknownNameError
from paritykit.testing import TINY_FAMILIES, nano_families
from paritykit.testing.faults import FAULTS, Fault, find
from paritykit.testing.scoreboard.models import MODELS, TRAINED, architectures, config_of, homes
from paritykit.testing.scoreboard.plan import (
    DTYPES,
    LEVELS,
    SMOKE,
    Filter,
    Trial,
    alone_sees,
    conditions,
    fitting,
    make_plan,
    models_of,
    only_audited,
    order,
    share,
)

PLAN = make_plan()
TINY = [t for t in PLAN if t.model in MODELS]
REAL = [f for _, f in FAULTS.items() if f.kind != "null"]


def of(fault: Fault, engine: str) -> list[Trial]:
    return [t for t in TINY if t.fault == fault.name and t.engine == engine]


def test_there_is_enough_to_say_something() -> None:
    assert len({t.fault for t in PLAN if t.kind == "fault"}) >= 60
    assert len({t.model for t in TINY if t.kind == "fault" and t.engine == "nano"}) == len(nano_families()) >= 6
    assert len({t.model for t in TINY if t.kind == "fault" and t.engine == "vllm"}) >= 6


@pytest.mark.parametrize("engine", ["nano", "vllm"])
@pytest.mark.parametrize("fault", REAL, ids=lambda f: f.name)
def test_every_fault_is_tried_at_every_strength_and_in_both_dtypes_in_one_model(fault: Fault, engine: str) -> None:
    found = of(fault, engine)
    if engine not in fault.engines or (only_audited(fault) and engine != "nano"):
        assert not found
        return
    levels = list(LEVELS) if fault.graded else ["loud"]
    dtypes = DTYPES[:1] if only_audited(fault) else DTYPES
    first = Counter(t.model for t in found).most_common(1)[0][0]
    assert {(t.level, t.dtype) for t in found if t.model == first} == {(n, d) for n in levels for d in dtypes}
    assert {t.model for t in found} <= set(fitting(fault, engine)) <= set(homes(fault))


def test_many_faults_are_tried_in_several_models_and_every_model_has_many() -> None:
    models = Counter(len({t.model for t in of(f, "nano")}) for f in REAL if "nano" in f.engines)
    assert models[3] > sum(models.values()) / 2
    assert min(Counter(t.model for t in TINY if t.kind == "fault").values()) > 40


def test_the_whole_has_every_fault_in_every_model_it_fits() -> None:
    whole = make_plan(full=True)
    assert {t.id for t in PLAN} <= {t.id for t in whole}
    for fault in REAL:
        if "vllm" in fault.engines and not only_audited(fault):
            trained = [] if alone_sees(fault, "vllm") else fitting(fault, "vllm", TRAINED)
            assert {t.model for t in whole if t.fault == fault.name and t.engine == "vllm"} == {
                *fitting(fault, "vllm"),
                *trained,
            }


@pytest.mark.parametrize("engine", ["nano", "vllm"])
def test_clean_pairs_are_run_in_every_model_dtype_and_number_of_ranks(engine: str) -> None:
    clean = [t for t in TINY if t.kind == "clean" and t.engine == engine]
    assert len(clean) > 40
    families = TINY_FAMILIES if engine == "vllm" else nano_families()
    wanted = {(family, dtype, ranks) for family in families for dtype in DTYPES for ranks in (1, 2)}
    assert {(MODELS[t.model][0], t.dtype, t.ranks) for t in clean if t.when == SMOKE} == wanted
    assert {t.when for t in clean} == {SMOKE, *conditions(engine)}


def test_trained_models_have_clean_pairs_and_faults() -> None:
    faults = [t for t in PLAN if t.kind == "fault" and t.model in TRAINED]
    assert {t.dtype for t in faults} == {"bfloat16"}
    assert len({t.fault for t in faults}) > 30
    assert {t.model for t in faults} == set(models_of("nano", TRAINED)) < set(TRAINED)
    clean = {(t.engine, t.model, t.dtype) for t in PLAN if t.kind == "clean" and t.model in TRAINED}
    assert clean == {(e, m, d) for e in ("nano", "vllm") for m in models_of(e, TRAINED) for d in DTYPES}


def test_architectures_are_drawn_for_clean_pairs_of_vllm() -> None:
    found = [t for t in PLAN if t.model.startswith("drawn:")]
    assert {(t.kind, t.engine, t.ranks) for t in found} == {("clean", "vllm", 1)}
    assert len({t.model for t in found}) == 50
    assert architectures() == sorted({t.model for t in found}, key=architectures().index)


@pytest.mark.parametrize(("engine", "fault", "checks"), [
    ("nano", "block-freed-early", ("kv_cache", "batching")),
    ("nano", "prefix-hit-too-long", ()),
    ("vllm", "prefix-hit-too-long", ("prefix_cache",)),
    ("nano", "rope-theta", ()),
    ("nano", "file-truncated", ()),
])  # fmt: skip
def test_what_only_an_engine_alone_shows_has_a_clean_pair_under_the_same_checks(
    engine: str, fault: str, checks: tuple[str, ...]
) -> None:
    assert alone_sees(find(fault), engine) == checks
    when = find(fault).when.words
    clean = {(t.checks, t.dtype) for t in PLAN if t.kind == "clean" and t.engine == engine and t.when == when}
    assert {(checks, dtype) for dtype in DTYPES} <= clean


def test_null_faults_are_tried_in_both_engines() -> None:
    nulls = {f.name for _, f in FAULTS.items() if f.kind == "null"}
    assert {(t.fault, t.engine) for t in PLAN if t.kind == "null"} == {(n, e) for n in nulls for e in ("nano", "vllm")}


def test_no_trial_is_there_twice_and_an_engine_is_opened_once() -> None:
    assert len({t.id for t in PLAN}) == len(PLAN)
    engines = [(t.engine, t.model, t.dtype, str(t.arguments)) for t in order(PLAN)]
    runs = [e for n, e in enumerate(engines) if not n or engines[n - 1] != e]
    assert len(runs) == len(set(runs))


@given(count=st.integers(1, 5), seed=st.randoms(use_true_random=False))
def test_shards_part_the_trials(count: int, seed: object) -> None:
    some = PLAN[:: 7 + count]
    parts = [share(some, number, count) for number in range(1, count + 1)]
    assert sorted(t.id for part in parts for t in part) == sorted(t.id for t in some)
    groups = [{(t.engine, t.model, t.dtype) for t in part} for part in parts]
    assert sum(map(len, groups)) == len(set().union(*groups)), "what an engine's model needs stays together"


def test_shards_are_about_as_long() -> None:
    sizes = [len(share(PLAN, n, 2)) for n in (1, 2)]
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize(("names", "why"), [
    ({"engines": ("vlm",)}, "did you mean 'vllm'"),
    ({"models": ("gemma9",)}, "unknown family 'gemma9'"),
    ({"dtypes": ("float16",)}, "unknown dtype 'float16'"),
    ({"faults": ("rope-teta",)}, "did you mean 'rope-theta'"),
])  # fmt: skip
def test_a_name_that_is_not_there_is_a_usage_error(names: dict[str, tuple[str, ...]], why: str) -> None:
    with pytest.raises(UnknownNameError, match=why):
        Filter(**names)


def test_names_are_chosen() -> None:
    wanted = Filter(engines=("nano",), models=("qwen2",), dtypes=("float32",), faults=("rope-theta", "norm-eps"))
    found = [t for t in make_plan(full=True) if wanted.fits(t)]
    assert {t.fault for t in found} == {"rope-theta", "norm-eps"}
    assert {(t.engine, t.model, t.dtype) for t in found} == {("nano", "qwen2", "float32")}
    assert len(found) == 2 * len(LEVELS)
    crowded = find("stale-after-preemption")
    assert {"gemma2", "gemma3"} == set(fitting(crowded, "nano")) - set(fitting(crowded, "vllm"))
    assert all(map(Filter().fits, PLAN))


def test_a_trial_knows_how_it_is_run() -> None:
    fault = find("reduce-twice")
    planted = Trial(kind="fault", engine="nano", model="qwen2", dtype="float32", fault=fault.name)
    assert planted.arguments == {"tensor_parallel_size": 2}
    assert planted.cases() == fault.when.cases(vocab_size=499)
    smoke = Trial(kind="clean", engine="nano", model="qwen2", dtype="bfloat16", when=SMOKE, ranks=2)
    assert smoke.arguments == {"tensor_parallel_size": 2}
    assert [c.id for c in smoke.cases()][:2] == ["short", "long-40"]
    crowded = Trial(kind="fault", engine="vllm", model="qwen2", dtype="float32", fault="stale-after-preemption")
    assert crowded.arguments == {"block_size": 32, "num_gpu_blocks_override": 6, "max_model_len": 96}
    rounded = Trial(kind="clean", engine="nano", model="qwen2", dtype="bfloat16", when="an fp8 KV cache")
    assert rounded.arguments == {"kv_dtype": "fp8"}


def test_models_have_what_faults_need() -> None:
    assert all(homes(f) for f in REAL)
    assert homes(find("expert-not-loaded")).keys() <= {"mixtral", "qwen3_moe"}
    assert homes(find("weight-of-another-layer")) == dict.fromkeys(homes(find("rope-pairing")), 1)
    assert NanoConfig.read(config_of("llama")).qkv_bias
