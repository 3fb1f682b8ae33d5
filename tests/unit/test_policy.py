"""Policies are read as data: each remembers where it was written, and one without sense is refused by its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paritykit.comparison.policy import find_policy, read_policies
from paritykit.config import load_config
from paritykit.errors import UnknownNameError, UsageError
from paritykit.runner import policies_of

CHECKS = ["modules", "logits"]


def read(*entries: Any) -> Any:
    return read_policies(entries, source="/some/where/pyproject.toml", checks=CHECKS)


def test_a_policy_remembers_where_it_was_written(tmp_path: Path) -> None:
    entries = ('point = "*.mlp"\nfactor = 3', 'tolerance = 0.1\nreason = "r"')
    (tmp_path / "pyproject.toml").write_text("".join(f"[[tool.paritykit.policy]]\n{e}\n" for e in entries))
    first, second = policies_of(load_config({}, environ={}, start=tmp_path))
    assert (first.point, first.factor, first.tolerance, first.note) == (
        "*.mlp",
        3.0,
        None,
        "policy 1 of pyproject.toml",
    )
    assert (second.point, second.tolerance, second.note) == ("*", 0.1, "policy 2 of pyproject.toml: r")
    given = load_config({}, environ={"PARITYKIT_POLICY": '[{"factor": 4}]'}, start=tmp_path)
    assert [p.note for p in policies_of(given)] == ["policy 1 of PARITYKIT_POLICY"]


@pytest.mark.parametrize(("asked", "number"), [
    ({"point": "model.layers.3.mlp", "dtype": "bfloat16", "check": "modules"}, 3),
    ({"point": "model.layers.3.mlp", "dtype": "bfloat16", "check": "logits"}, 2),
    ({"point": "model.layers.3.mlp", "dtype": "float32", "check": "modules"}, 1),
    ({"point": "model.norm", "dtype": "bfloat16", "check": "modules"}, None),
])  # fmt: skip
def test_the_last_that_fits_counts(asked: dict[str, str], number: int | None) -> None:
    policies = read(
        {"point": "*.mlp", "factor": 2},
        {"point": "*.mlp", "factor": 3, "dtype": "bfloat16"},
        {"point": "*.mlp", "factor": 4, "dtype": "bfloat16", "check": "modules"},
    )
    assert find_policy(policies, **asked) is (None if number is None else policies[number - 1])


@pytest.mark.parametrize(("entry", "error", "said"), [
    (3, UsageError, "policy 1 of pyproject.toml must be a table, not 3"),
    ({"pont": "x", "factor": 2}, UnknownNameError, "key in policy 1 of pyproject.toml 'pont'; did you mean 'point'"),
    ({"source": "x", "factor": 2}, UnknownNameError, "unknown key in policy 1"),
    ({"point": 3, "factor": 2}, UsageError, "policy 1 of pyproject.toml: Expected `str`"),
    ({"dtype": "bfloat", "factor": 2}, UnknownNameError, "did you mean 'bfloat16'"),
    ({"check": "module", "factor": 2}, UnknownNameError, "did you mean 'modules'"),
    ({"point": "x"}, UsageError, "must have a factor"),
    ({"factor": 2, "tolerance": 0.1}, UsageError, "and not both"),
    *(({"factor": v}, UsageError, "factor must be a number above 0") for v in (0, -1, float("nan"), float("inf"))),
    *(({"tolerance": v}, UsageError, "between 0 and 1") for v in (0, 1, -0.5, float("nan"))),
], ids=str)  # fmt: skip
def test_one_without_sense_is_refused(entry: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as found:
        read(entry)
    assert said in str(found.value)
