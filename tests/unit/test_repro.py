"""A failure is shown again by one command and by two lines of Python: both mean the same run."""

from __future__ import annotations

import shlex
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import paritykit as pk
from paritykit.cli import cli
from paritykit.options import format_engine_args, parse_engine_args
from paritykit.plan import make_plan
from paritykit.reports.repro import repro, script
from paritykit.repro import command_of
from paritykit.results import Divergence, Results, Run, Side, Summary
from paritykit.testing.faults import FAULTS
from tests.made import finding

VALUES = st.recursive(
    st.text() | st.integers(-(2**53), 2**53) | st.booleans() | st.none() | st.just("None") | st.just("7"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["block_size", "kv", "after_load_args"]), VALUES))
def test_engine_arguments_are_read_back(arguments: dict[str, Any]) -> None:
    assert parse_engine_args(format_engine_args(arguments)) == arguments


def failing(command: str, *, workload: list[str], condition: str = "in one batch") -> Results:
    side = Side(engine="nano", model="m", dtype="float32")
    found = finding(check="batching", case="len-1", point="a", verdict="fail", condition=condition)
    return Results(
        run=Run(paritykit="0", reference=side, candidate=side, checks=["batching"], command=command),
        findings=[msgspec.structs.replace(found, workload=workload, origin="introduced")],
        summary=Summary(
            verdict="fail", compared=1, failed=1, skipped=0, unmatched=0,
            first_divergence=Divergence(check="batching", case="len-1", point="a", origin="introduced", seen_at="a"),
        ),
    )  # fmt: skip


KEPT = "paritykit run m --candidate=nano --dtype float32 --engine-arg kv=paged"
COMMAND = f"{KEPT} --check modules --case short --html a.html"


def test_the_workload_that_failed_takes_the_place_of_the_cases() -> None:
    shown = repro(failing(COMMAND, workload=["len-1", "len-1@b"]))
    assert shown == f"{KEPT} --check batching --case len-1 --case len-1@b"


def test_without_a_workload_all_cases_stay_where_neighbours_matter() -> None:
    assert repro(failing(f"{COMMAND} --case long-40", workload=[])).endswith(
        "--check batching --case short --case long-40"
    )
    alone = repro(failing(f"{COMMAND} --case long-40", workload=[], condition=""))
    assert alone.endswith("--check batching --case len-1")


def test_python_says_what_the_command_says() -> None:
    text = script(failing(f"{COMMAND} --tensor-parallel-size 2 --map r.toml --no-floor", workload=["len-1"]))
    assert text.splitlines() == [
        "import paritykit as pk",
        "pk.run('m', candidate='nano', dtype='float32', map_file='r.toml', tensor_parallel_size=2, "
        "floor=False, engine_args={'kv': 'paged'}, checks=['batching'], cases=pk.cases('len-1')).raise_on_failure()",
    ]


@pytest.mark.parametrize(("option", "told"), [("--local", "local=True"), ("--no-local", "local=False")])
def test_local_errors_are_asked_for_again_as_they_were(option: str, told: str) -> None:
    assert f"dtype='float32', {told}, engine_args" in script(failing(f"{COMMAND} {option}", workload=["len-1"]))
    plan = make_plan("tiny:qwen2", given={"candidate": "nano"}, local=option == "--local")
    assert option in command_of(plan, cases=["short"])


@pytest.mark.parametrize("command", ["pytest suites -k x", "paritykit run m --cases mine.jsonl", ""])
def test_no_python_where_it_would_say_something_else(command: str) -> None:
    assert script(failing(command, workload=["len-1"])) == ""


def test_a_plan_is_planned_again_by_its_command() -> None:
    given: dict[str, Any] = {"candidate": "nano", "dtype": "float32", "reference_dtype": "bfloat16", "floor": False}
    arguments = FAULTS.get("rope-theta").arguments(layer=1)
    plan = make_plan("tiny:qwen2", given=given, engine_args={"block_size": 3, **arguments}, tensor_parallel_size=2,
                     explain=False)  # fmt: skip
    words = command_of(plan, cases=["short"], checks=["modules"])
    assert shlex.split(shlex.join(words)) == words
    seen: dict[str, Any] = {}

    @pk_command
    def keep(**options: Any) -> None:
        seen.update(options)

    assert CliRunner().invoke(keep, words[2:]).exit_code == 0
    assert parse_engine_args(seen["engine_arg"]) == plan.engine_args
    assert (seen["model"], seen["candidate"], seen["dtype"]) == ("tiny:qwen2", "nano", "float32")
    assert (seen["reference_dtype"], seen["tensor_parallel_size"]) == ("bfloat16", 2)
    assert (seen["case"], seen["check"]) == (("short",), ("modules",))
    assert (seen["no_floor"], seen["no_explain"], seen["no_cache"]) == (True, True, False)


def pk_command(function: Any) -> Any:
    """``function`` behind the very options of ``paritykit run``."""
    import click

    return click.Command("run", params=cli.commands["run"].params, callback=function)


def test_python_shows_a_planted_failure_again() -> None:
    arguments = FAULTS.get("kv-table-rows-swapped").arguments(layer=1)
    run = pk.run(
        "tiny:qwen2", candidate="nano", dtype="float32", checks=["batching"], engine_args=arguments,
        cases=pk.cases("len-1", "len-1@b"),
    )  # fmt: skip
    assert run.summary.verdict == "fail"
    with pytest.raises(pk.ParityFailure, match="nano \\(float32\\) differs from itself in one batch"):
        exec(script(run.results))
