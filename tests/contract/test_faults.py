"""The fault table keeps its promises: every fault shows where it says, under its conditions only, and can be undone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paritykit as pk
from paritykit.audit import audit
from paritykit.checks import CHECKS
from paritykit.cli import execute
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.engines.process import ProcessEngine
from paritykit.errors import UnknownNameError, UsageError
from paritykit.options import parse_engine_args
from paritykit.runner import audit_results, weight_results
from paritykit.testing import tiny_config
from paritykit.testing.faults import FAULTS, Fault, find, for_model, planted
from paritykit.testing.faults.conditions import PLAIN
from paritykit.testing.faults.page import markdown
from paritykit.testing.faults.planting import plant_host
from paritykit.testing.faults.table import KINDS
from tests.faulty import LAYERS, MODELS, Ground, Trial, differences, first_blamed, homes, model_of, native
from tests.nano import one_thread

ROOT = Path(__file__).parents[2]
ALL = dict(FAULTS.items())
NULL = [f for f in ALL.values() if f.kind == "null"]
REAL = [f for f in ALL.values() if f.kind != "null"]
PLANTED = [f for f in REAL if f.stage in ("live", "host") and "nano" in f.engines]
LOADED = [f for f in REAL if f.stage == "loading" and "nano" in f.engines]
FILED = [f for f in REAL if f.stage == "checkpoint"]
CONDITIONAL = [f for f in PLANTED if f.when is not PLAIN and f.name != "kv-block-ids-wrap"]
"""Which numbers blocks have is chance."""
RESCHEDULED = 1e-5
"""Rounding differs where a fault changes which rows are computed together."""
WEAK = 1e-3
REFERENCE = re.compile(r"[\w/.-]+ (#\d+|[0-9a-f]{7})")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    found = Ground(tmp_path_factory.mktemp("captures"))
    yield found
    found.close()


def every_home(faults: list[Fault]) -> list[Any]:
    """Each fault in each model it fits: the first in CI, the others where time does not matter."""
    found = []
    for fault in faults:
        for number, name in enumerate(homes(fault)):
            marks = [pytest.mark.xdist_group(f"faults-{name}")]
            if number or fault.when.ranks > 2:
                marks.append(pytest.mark.deep)
            found.append(pytest.param(fault, name, id=f"{fault.name}-{name}", marks=marks))
    return found


def config_of(name: str) -> dict[str, Any]:
    family, overrides = MODELS[name]
    return tiny_config(family, num_hidden_layers=LAYERS, **overrides)


def trial(ground: Ground, fault: Fault, name: str) -> Trial:
    return Trial(ground, fault, name, homes(fault)[name])


# the table


def test_there_are_faults_of_every_kind_and_for_both_engines() -> None:
    assert {f.kind for f in ALL.values()} == set(KINDS)
    assert len([f for f in REAL if "nano" in f.engines]) >= 100
    assert len([f for f in REAL if "vllm" in f.engines]) >= 90
    assert len(NULL) >= 3


@pytest.mark.parametrize("fault", ALL.values(), ids=list(ALL))
def test_a_fault_says_what_it_is(fault: Fault) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fault.name)
    assert not fault.what[0].islower()
    assert fault.what.endswith(".")
    assert all(REFERENCE.fullmatch(reference) for reference in fault.seen), fault.seen
    assert set(fault.engines) <= {"nano", "vllm"}
    assert set(fault.checks) <= set(CHECKS.names())
    assert fault.kind in KINDS
    assert bool(fault.cause) == bool(fault.checks) == (fault.kind != "null")
    assert fault.stage == "live" or not fault.graded


def test_what_is_said_is_said_once() -> None:
    said = [f.what for f in ALL.values()]
    assert len(said) == len(set(said))


def test_causes_are_the_names_of_the_design() -> None:
    known = {
        "rope-pairing", "rope-theta", "rope-partial", "rope-scaling", "position-shift", "sliding-window",
        "attention-scale", "softcap", "mask", "norm-eps", "norm-offset", "norm-kind", "bias-missing", "bias-doubled",
        "rows-permuted", "gate-up-swapped", "activation-kind", "residual", "scale-factor", "weight-corrupt",
        "weight-not-loaded", "weight-shared-wrongly", "kv-slot", "kv-block-table", "kv-stale", "tp-shard", "tp-reduce",
        "tp-bias", "vocab-shard", "lm-head", "moe-routing", "moe-scale", "dtype-rounding", "unknown",
    }  # fmt: skip
    assert {f.cause for f in REAL} == known


@pytest.mark.parametrize("fault", ALL.values(), ids=list(ALL))
def test_every_fault_fits_a_model_and_not_those_that_lack_what_it_needs(fault: Fault) -> None:
    assert homes(fault)
    for need in fault.needs:
        alone = replace(fault, needs=(need,))
        others = [*map(config_of, MODELS), tiny_config("llama", rms_norm_eps=1e-6)]
        assert any(len(alone.layers(config)) < config["num_hidden_layers"] for config in others), need.words


def test_an_unknown_name_is_a_usage_error_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rope-theta'"):
        find("rope-teta")
    with pytest.raises(UnknownNameError, match="engine with plantable faults 'hf'"):
        for_model({}, engine="hf")


def test_faults_of_a_model_are_those_it_has_what_they_need() -> None:
    dense = {f.name for f in for_model(tiny_config("llama"))}
    sparse = {f.name for f in for_model(tiny_config("mixtral"))}
    assert "window-missing" not in dense
    assert "window-missing" in {f.name for f in for_model(tiny_config("mistral"))}
    assert {n for n in sparse - dense if n.startswith("expert")}
    assert "gate-up-swapped" in dense - sparse
    assert "block-freed-early" not in {f.name for f in for_model(tiny_config("llama"), engine="vllm")}
    assert for_model(tiny_config("gpt2")) == []


def test_the_page_lists_all_of_them() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert markdown() in page, "docs/faults.md is not what `python -m paritykit.testing.faults.page` prints"


@pytest.mark.parametrize(("change", "why"), [
    ({"strength": 0.0}, "more than 0"),
    ({"strength": 1.5}, "at most 1"),
])  # fmt: skip
def test_a_strength_that_cannot_be_is_a_usage_error(change: dict[str, float], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        find("rope-theta").arguments(**change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not graded"):
        find("kv-write-lost").arguments(strength=0.5)


# where they show


@pytest.mark.parametrize(("fault", "name"), every_home(PLANTED))
def test_a_planted_fault_shows_where_it_says_and_is_gone_afterwards(ground: Ground, fault: Fault, name: str) -> None:
    made = trial(ground, fault, name)
    clean, wrong = made.clean(), made.planted()
    floor = RESCHEDULED if fault.stage == "host" else 0.0
    found = differences(clean, wrong, floor=floor)
    place = native(fault, layer=made.layer)
    if place.startswith("#tokens"):
        assert found == {}
        assert any(clean.generated(c) != wrong.generated(c) for c in clean.cases)
    else:
        assert first_blamed(clean, found) == place, list(found)[:3]
    if fault.when.only == "decode":
        assert differences(clean, wrong, prefill=True) == {}
    if fault.when.only == "later":
        assert differences(clean, wrong, cases=[c.id for c in made.cases if c.batch == 0]) == {}
    assert differences(clean, ground.run(made.engine, made.cases)) == {}


@pytest.mark.parametrize(("fault", "name"), every_home([f for f in PLANTED if f.graded]))
def test_a_weaker_fault_changes_less_in_the_same_place(ground: Ground, fault: Fault, name: str) -> None:
    made = trial(ground, fault, name)
    strong, weak = (differences(made.clean(), made.planted(strength=s)) for s in (1.0, WEAK))
    first = next(iter(strong))
    assert first_blamed(made.clean(), weak) == first_blamed(made.clean(), strong)
    assert 0 < weak[first] < 0.02 * strong[first]


@pytest.mark.parametrize(("fault", "name"), every_home(CONDITIONAL))
def test_a_fault_of_certain_conditions_is_quiet_under_others(ground: Ground, fault: Fault, name: str) -> None:
    """One prompt alone, shorter than a window or a block, on one rank, and nothing new."""
    made = trial(ground, fault, name)
    engine = ground.engine(made.model)
    cases = [pk.Case(id="alone", tokens=tuple(range(7, 14)))]
    with planted(engine, fault, layer=made.layer):
        wrong = ground.run(engine, cases)
    assert differences(ground.clean(engine, cases), wrong) == {}


@pytest.mark.parametrize(("fault", "name"), every_home(PLANTED))
def test_the_checks_that_must_find_it_do(ground: Ground, fault: Fault, name: str) -> None:
    made = trial(ground, fault, name)
    results = made.compare(made.planted())
    failed = {f.check for f in results.findings if f.verdict == "fail"}
    assert set(fault.checks) & {"modules", "logits", "tokens"} <= failed
    first = results.summary.first_divergence
    if "modules" in fault.checks or fault.point.startswith("#"):
        assert first is not None
        assert fault.at(layer=made.layer) in (first.point, first.seen_at)
        assert first.origin != "inherited"


@pytest.mark.parametrize(("fault", "name"), every_home([f for f in NULL if f.stage == "live"]))
def test_a_null_fault_changes_nothing_and_no_check_reports_it(ground: Ground, fault: Fault, name: str) -> None:
    made = trial(ground, fault, name)
    wrong = made.planted()
    assert differences(made.clean(), wrong) == {}
    assert made.compare(wrong).summary.verdict == "pass"


@pytest.mark.parametrize(("fault", "first"), [
    ("residual-dropped", "model.layers.1.post_attention_layernorm#input"),
    ("residual-dropped-after-mlp", "model.layers.1"),
])  # fmt: skip
def test_the_two_residual_sums_are_told_apart(ground: Ground, fault: str, first: str) -> None:
    made = trial(ground, find(fault), "qwen2")
    assert next(iter(differences(made.clean(), made.planted()))) == first


# loading and files


@pytest.mark.parametrize(("fault", "name"), every_home(LOADED))
def test_a_loading_fault_is_found_by_the_checks_that_must(ground: Ground, fault: Fault, name: str) -> None:
    made = trial(ground, fault, name)
    engine = NanoEngine(str(made.model), **fault.when.arguments, **fault.arguments(layer=made.layer))
    engine.open()
    try:
        weights = weight_results(engine.ledger(), engine.describe(), Checkpoint.find(str(made.model)))
        results = made.compare(ground.run(engine, made.cases))
    finally:
        engine.close()
    failed = {f.check for r in (weights, results) for f in r.findings if f.verdict == "fail"}
    assert set(fault.checks) & {"weights", "modules", "logits"} <= failed
    first = results.summary.first_divergence
    assert first is not None
    assert (first.point, first.origin) == (fault.at(layer=made.layer), "introduced")


def test_a_null_fault_of_loading_changes_nothing(ground: Ground) -> None:
    made = trial(ground, find("null-loading"), "qwen2")
    engine = NanoEngine(str(made.model), **made.fault.arguments(layer=1))
    engine.open()
    weights = weight_results(engine.ledger(), engine.describe(), Checkpoint.find(str(made.model)))
    assert weights.summary.verdict == "pass"
    plain = ground.engine(made.model)
    assert differences(ground.clean(plain, made.cases), ground.run(engine, made.cases)) == {}
    engine.close()


@pytest.mark.parametrize(("fault", "name"), every_home(FILED))
def test_a_damaged_checkpoint_is_found_by_the_checks_that_must(
    ground: Ground, fault: Fault, name: str, tmp_path: Path
) -> None:
    made = trial(ground, fault, name)
    folder = fault.damage(made.model, tmp_path / fault.name, layer=made.layer)  # engines are known by their folder
    if "checkpoint" in fault.checks:
        assert audit_results(audit(folder), "model").summary.verdict == "fail"
    if "modules" in fault.checks:
        results = made.compare(ground.run(ground.engine(folder), made.cases))
        failed = {f.check for f in results.findings if f.verdict == "fail"}
        assert set(fault.checks) & {"modules", "logits"} <= failed
        first = results.summary.first_divergence
        assert first is not None
        assert (first.point, first.origin) == (fault.at(layer=made.layer), "introduced")


def test_a_null_fault_of_files_writes_the_same_tensors(tmp_path: Path) -> None:
    model = model_of("qwen2")
    folder = find("null-files").damage(model, tmp_path / "copy")
    assert audit_results(audit(folder), "model").summary.verdict == "pass"
    mine, theirs = (load_file(f / "model.safetensors") for f in (model, folder))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_the_checkpoint_itself_stays_as_it_was(tmp_path: Path) -> None:
    model = model_of("qwen2")
    before = {f.name: f.read_bytes() for f in model.iterdir()}
    find("file-bytes-flipped").damage(model, tmp_path / "a")
    find("config-rope-theta").damage(model, tmp_path / "b")
    assert before == {f.name: f.read_bytes() for f in model.iterdir()}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 10000.0


def test_a_copy_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        find("null-files").damage(model_of("qwen2"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no model\.safetensors"):
        find("null-files").damage(tmp_path / "empty", tmp_path / "copy")
    with pytest.raises(UsageError, match="not in a checkpoint's files"):
        find("rope-theta").damage(model_of("qwen2"), tmp_path / "copy")
    with pytest.raises(KeyError):
        find("file-key-missing").damage(model_of("qwen2"), tmp_path / "copy", layer=99)
    assert not (tmp_path / "copy").exists()


# planting


def test_arguments_plant_what_the_block_plants(ground: Ground) -> None:
    for fault, name in ((find("rope-theta"), "qwen2"), (find("prefix-hit-too-long"), "qwen2")):
        made = trial(ground, fault, name)
        options = {**fault.when.arguments, **fault.arguments(layer=made.layer)}
        engine = ground.kind(str(made.model), provenance=False, **options)
        engine.open()
        assert differences(made.planted(), ground.run(engine, made.cases)) == {}
        engine.close()


def test_faults_are_planted_in_an_engine_with_a_process_of_its_own(ground: Ground) -> None:
    made = trial(ground, find("prefix-hit-too-long"), "qwen2")
    engine = ProcessEngine("nano", str(made.model), {"provenance": False, **made.fault.when.arguments})
    engine.open()
    try:
        clean = ground.run(engine, made.cases)
        for name in ("prefix-hit-too-long", "rope-theta"):
            with planted(engine, name, layer=1):
                assert differences(clean, ground.run(engine, made.cases))
            assert differences(clean, ground.run(engine, made.cases)) == {}
        with pytest.raises(UsageError, match="needs a sliding window"), planted(engine, "window-missing", layer=1):
            pass
    finally:
        engine.close()


def test_faults_within_each_other_are_taken_back_one_by_one(ground: Ground) -> None:
    made = trial(ground, find("attention-scale"), "qwen2")
    alone = made.planted()
    with planted(made.engine, "attention-scale", layer=1):
        with planted(made.engine, "norm-eps", layer=0):
            both = ground.run(made.engine, made.cases)
        assert differences(alone, ground.run(made.engine, made.cases)) == {}
    assert first_blamed(alone, differences(alone, both)) == "model.layers.0.input_layernorm"


def test_an_error_inside_the_block_leaves_the_engine_clean(ground: Ground) -> None:
    made = trial(ground, find("attention-scale"), "qwen2")
    clean = made.clean()
    with pytest.raises(RuntimeError, match="in the block"), planted(made.engine, made.fault, layer=1):
        raise RuntimeError("in the block")
    assert differences(clean, ground.run(made.engine, made.cases)) == {}


def test_a_planted_engine_does_not_change_another_in_the_same_process(ground: Ground) -> None:
    made = trial(ground, find("norm-eps"), "qwen2")
    other = ground.engine(made.model, block_size=8)
    before, clean = made.clean(), ground.clean(other, made.cases)
    fitting = [f for f in for_model(config_of("qwen2")) if f.stage == "live" and 1 in f.layers(config_of("qwen2"))]
    assert len(fitting) > 50
    try:
        for fault in fitting:
            made.engine.call("paritykit.testing.faults.planting:plant", fault.order(layer=1))
        assert differences(clean, ground.run(other, made.cases)) == {}
    finally:
        while made.engine.llm.team.worker.planted_faults:
            made.engine.call("paritykit.testing.faults.planting:unplant", {})
    assert differences(before, ground.run(made.engine, made.cases)) == {}


@pytest.mark.parametrize(("fault", "layer", "why"), [
    ("window-missing", 1, "needs a sliding window in the layer"),
    ("rope-theta", 7, "here that is layer 0, 1, 2"),
    ("bias-not-loaded", 1, r"use arguments\(\)"),
    ("file-truncated", 1, r"use damage\(\)"),
    ("rope-teta", 1, "did you mean"),
])  # fmt: skip
def test_what_cannot_be_planted_is_a_usage_error(ground: Ground, fault: str, layer: int, why: str) -> None:
    engine = ground.engine(model_of("qwen2"))
    with pytest.raises(UsageError, match=why), planted(engine, fault, layer=layer):
        pass
    with pytest.raises(UsageError, match="no fault is planted"):
        engine.call("paritykit.testing.faults.planting:unplant", {})


def test_engines_that_call_no_functions_are_refused() -> None:
    with pytest.raises(UsageError, match="not in HFEngine"), planted(HFEngine(str(model_of("qwen2"))), "rope-theta"):
        pass


def test_where_nothing_is_scheduled_nothing_is_planted() -> None:
    with pytest.raises(UsageError, match="not in HFEngine"):
        plant_host(HFEngine(str(model_of("qwen2"))), fault="prefix-hit-too-long")


@pytest.mark.deep
def test_engines_that_call_no_functions_are_refused_in_their_process() -> None:
    engine = ProcessEngine("hf", str(model_of("qwen2")), {})
    engine.open()
    try:
        with pytest.raises(UsageError, match="HFEngine calls no functions"), planted(engine, "rope-theta"):
            pass
    finally:
        engine.close()


def test_a_fault_of_vllm_alone_is_refused_by_nano(ground: Ground) -> None:
    FAULTS.register("of-vllm", replace(find("null-forward"), name="of-vllm", engines=("vllm",)))
    try:
        with (
            pytest.raises(UsageError, match="in vllm, not in nano"),
            planted(ground.engine(model_of("qwen2")), "of-vllm"),
        ):
            pass
    finally:
        del FAULTS._values["of-vllm"]


def test_a_half_planted_fault_is_taken_back(ground: Ground) -> None:
    made = trial(ground, find("norm-eps"), "qwen2")
    clean = made.clean()

    def plant(site: Any) -> None:
        made.fault.plant(site)
        raise ValueError("half way")

    FAULTS.register("half", replace(made.fault, name="half", plant=plant))
    try:
        with pytest.raises(ValueError, match="half way"), planted(made.engine, "half", layer=1):
            pass
    finally:
        del FAULTS._values["half"]
    assert differences(clean, ground.run(made.engine, made.cases)) == {}


def test_the_command_line_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["list", "faults"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ALL)
    assert next(line for line in lines if line.startswith("rope-theta ")).endswith("not the one in the config.")


def test_the_command_line_takes_its_arguments() -> None:
    order = find("norm-eps").arguments(layer=2, strength=0.5)
    assert parse_engine_args([f"{key}={as_text(value)}" for key, value in order.items()]) == order


@pytest.mark.deep
def test_the_command_line_plants_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    order = find("norm-eps").arguments(layer=2)
    options = [part for key, value in order.items() for part in ("--engine-arg", f"{key}={as_text(value)}")]
    out = tmp_path / "run.jsonl"
    code = execute(["run", "tiny:qwen2", "--candidate", "nano", "--dtype", "float32", "--case", "short", "--quiet",
                    "--jsonl", str(out), *options])  # fmt: skip
    assert code == 1, capsys.readouterr().err
    assert json.loads(out.read_text().splitlines()[-1])["first_divergence"]["point"] == "model.layers.2.input_layernorm"


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
