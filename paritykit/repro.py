"""How to see a run again: one command. Reports narrow it to what failed."""

from __future__ import annotations

from collections.abc import Iterable

from paritykit.options import format_engine_args
from paritykit.plan import Plan


def command_of(plan: Plan, *, cases: Iterable[str], checks: Iterable[str] = ()) -> list[str]:
    """The words of a ``paritykit run`` that does what ``plan`` says."""
    words = ["paritykit", "run", plan.model]
    for name, value in _settings(plan).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    for option, arguments in (("--engine-arg", plan.engine_args), ("--reference-arg", plan.reference_args)):
        words += [word for argument in format_engine_args(arguments) for word in (option, argument)]
    words += ["--no-floor"] if plan.config["floor"] is False else []
    words += [] if plan.explain else ["--no-explain"]
    words += [] if plan.local is None else ["--local" if plan.local else "--no-local"]
    words += [word for name in checks for word in ("--check", name)]
    return words + [word for name in cases for word in ("--case", name)]


def _settings(plan: Plan) -> dict[str, object]:
    """What differs from the defaults; the candidate and its dtype always."""
    found: dict[str, object] = {"candidate": plan.config["candidate"], "dtype": plan.config["dtype"]}
    for name in ("reference", "reference_dtype"):
        if plan.config.source(name) != "default":
            found[name] = plan.config[name]
    if plan.tensor_parallel_size != 1:
        found["tensor_parallel_size"] = plan.tensor_parallel_size
    if plan.map_file:
        found["map"] = plan.map_file
    return found
