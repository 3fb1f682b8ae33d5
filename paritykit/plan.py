"""From what a user asks for to a session: everything that can be wrong is found before an engine starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

from paritykit.case import Case, CaseSet, read_cases, validate
from paritykit.checks import BASIC, CHECKS
from paritykit.config import Config, load_config
from paritykit.engines import check_engine, engine
from paritykit.engines.base import Progress
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.dtypes import dtype_name
from paritykit.engines.process import HostPool, HostProcess, ProcessEngine
from paritykit.engines.vllm.limits import check_parallel
from paritykit.errors import UnknownNameError, UsageError
from paritykit.mapping.user import UserRule, read_rules
from paritykit.models import resolve_model, tokenizer_of
from paritykit.runner import Session


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, as asked for.

    ``engine_args`` go to the candidate, ``reference_args`` to the reference; ``rules`` come from ``--map``.

    Cases are the named ones and the ``fixed`` ones, or those of ``cases_file``, picked by name.
    """

    model: str
    config: Config
    checks: tuple[str, ...]
    case_names: tuple[str, ...] = ()
    fixed: tuple[Case, ...] = ()
    cases_file: str = ""
    tensor_parallel_size: int = 1
    engine_args: dict[str, Any] = field(default_factory=dict)
    reference_args: dict[str, Any] = field(default_factory=dict)
    rules: list[UserRule] | None = None
    explain: bool = True
    map_file: str = ""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model. Raises UsageError if there is none."""
        return resolve_model(self.model)

    def open(self, *, progress: Progress | None = None) -> Session:
        """The session, its engines not started. Raises UsageError."""
        hosts = HostPool()
        return Session(
            reference=self.reference_engine(),
            candidate=self.candidate_engine(),
            cases=self.resolve_cases(),
            config=self.config,
            checkpoint=self.checkpoint,
            rules=self.rules,
            progress=progress,
            vary=partial(self.varied_engine, hosts=hosts),
            closing=hosts.stop,
            explain=self.explain,
        )

    def varied_engine(self, arguments: dict[str, Any], *, hosts: HostPool) -> Any:
        """The candidate with these arguments in place of its own, not started. Raises UsageError.

        Engines on as many ranks share a process, one after the other.
        """
        own = {"tensor_parallel_size": self.tensor_parallel_size, **self.engine_args, **arguments}
        ranks = own.pop("tensor_parallel_size")
        host = hosts.get(f"varied on {ranks * int(own.get('pipeline_parallel_size', 1))}")
        return replace(self, engine_args=own, tensor_parallel_size=ranks).candidate_engine(host)

    def resolve_cases(self) -> list[Case]:
        """The cases for this model. Raises UsageError."""
        return resolve_cases(self.checkpoint, names=self.case_names, fixed=self.fixed, file=self.cases_file)

    def reference_engine(self, host: HostProcess | None = None) -> Any:
        """The reference, not started; in ``host``, a process to share, where one is given."""
        arguments = {"dtype": self._dtype("reference_dtype"), **self.reference_args}
        return _engine(self.config["reference"], self.checkpoint, arguments, host)

    def candidate_engine(self, host: HostProcess | None = None) -> Any:
        """The candidate, not started.

        Raises UsageError for a parallel size the model cannot have, EngineMissingError if vLLM is not installed.
        """
        arguments = {"dtype": self._dtype("dtype"), **self.engine_args}
        if self.tensor_parallel_size != 1:
            arguments["tensor_parallel_size"] = self.tensor_parallel_size
        if self.config["candidate"] == "vllm":
            check_parallel(self.checkpoint, self.tensor_parallel_size)
            if find_spec("vllm") is None:
                from paritykit.engines.vllm.engine import import_vllm

                import_vllm()
        return _engine(self.config["candidate"], self.checkpoint, arguments, host)

    def _dtype(self, setting: str) -> str:
        wanted = self.config[setting]
        return dtype_name(self.checkpoint.dtype if wanted == "auto" else wanted)


def make_plan(
    model: str,
    *,
    given: Mapping[str, Any] | None = None,
    checks: Sequence[str] = (),
    case_names: Sequence[str] = (),
    fixed: Iterable[Case] = (),
    cases_file: str | os.PathLike[str] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    reference_args: Mapping[str, Any] | None = None,
    tensor_parallel_size: int = 1,
    map_file: str | os.PathLike[str] | None = None,
    explain: bool = True,
) -> Plan:
    """Check every name and read every file. Raises UsageError, with the nearest names where one is wrong."""
    config = load_config(given)
    for side in ("reference", "candidate"):
        check_engine(config[side])
        if config[side] == "module":
            raise UsageError(f"engine 'module' as {side} needs a live object; name a factory, package.module:factory")
    for name in checks:
        CHECKS.get(name)
    for setting in ("dtype", "reference_dtype"):
        if config[setting] != "auto":
            dtype_name(config[setting])
    if tensor_parallel_size < 1:
        raise UsageError(f"tensor_parallel_size must be at least 1, not {tensor_parallel_size}")
    if cases_file is None:
        CaseSet(case_names)
    return Plan(
        model=model,
        config=config,
        checks=tuple(checks) or BASIC,
        case_names=tuple(case_names),
        fixed=tuple(fixed),
        cases_file="" if cases_file is None else str(cases_file),
        tensor_parallel_size=tensor_parallel_size,
        engine_args=dict(engine_args or {}),
        reference_args=dict(reference_args or {}),
        rules=None if map_file is None else read_rules(map_file),
        explain=explain,
        map_file="" if map_file is None else str(map_file),
    )


def resolve_cases(
    checkpoint: Checkpoint, *, names: Sequence[str] = (), fixed: Sequence[Case] = (), file: str = ""
) -> list[Case]:
    """The cases for a checkpoint: built-in ones by name and ``fixed`` ones, or a file's, picked by id.

    Raises UsageError.
    """
    limits = {"vocab_size": checkpoint.vocab_size, "max_positions": checkpoint.max_positions}
    if not file:
        return CaseSet(names or (() if fixed else ("smoke",)), fixed).resolve(**limits)  # type: ignore[arg-type]
    found = {c.id: c for c in validate(read_cases(file, tokenize=tokenizer_of(checkpoint)), **limits)}  # type: ignore[arg-type]
    for name in names:
        if name not in found:
            raise UnknownNameError(f"case in {file}", name, found)
    return [c for c in found.values() if not names or c.id in names]


def _engine(name: str, checkpoint: Checkpoint, arguments: dict[str, Any], host: HostProcess | None) -> Any:
    if host is not None:
        return ProcessEngine(name, str(checkpoint.path), arguments, host=host)
    return engine(name, str(checkpoint.path), **arguments)
