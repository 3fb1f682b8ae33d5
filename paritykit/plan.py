"""From what a user asks for to a session: everything that can be wrong is found before an engine starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paritykit.case import Case, CaseSet, Written, read_cases
from paritykit.checks import BASIC, CHECKS
from paritykit.config import Config, load_config
from paritykit.engines import check_engine, engine
from paritykit.engines.base import Progress
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.dtypes import dtype_name
from paritykit.engines.process import HostPool, HostProcess, ProcessEngine
from paritykit.engines.vllm.limits import check_parallel
from paritykit.errors import UnknownNameError, UsageError
from paritykit.floor_file import FloorFile, floor_of
from paritykit.machine import cores, free_memory, threads
from paritykit.mapping.user import UserRule, read_rules
from paritykit.models import cases_for, resolve_model
from paritykit.reference import ABOVE, PRECISION, Reference, Role
from paritykit.session import Session
from paritykit.store import key_of, open_store

COPIES = 10
"""Times the checkpoint's size that two engines take at most: of a checkpoint in bfloat16 the reference four in float64
and one while it loads, the candidate two in float32 and as many again for kernels that pack weights; one to spare."""
BESIDE = 8 << 30
"""Bytes of two engines whatever their weights: libraries, vLLM's cache on a CPU (4 GiB), activations."""


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
    fixed: tuple[Case | Written, ...] = ()
    cases_file: str = ""
    tensor_parallel_size: int = 1
    engine_args: dict[str, Any] = field(default_factory=dict)
    reference_args: dict[str, Any] = field(default_factory=dict)
    rules: list[UserRule] | None = None
    map_file: str = ""
    explain: bool = True
    local: bool | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model. Raises UsageError if there is none."""
        return resolve_model(self.model)

    def open(self, *, progress: Progress | None = None) -> Session:
        """The session, its engines not started. Raises UsageError."""
        hosts = HostPool()
        return Session(
            reference=self.reference(),
            candidate=self.candidate_engine(),
            cases=self.resolve_cases(),
            config=self.config,
            checkpoint=self.checkpoint,
            rules=self.rules,
            progress=progress,
            vary=partial(self.varied_engine, hosts=hosts),
            closing=hosts.stop,
            explain=self.explain,
            local=self.local,
            together=self.fits_together(),
            beside=2 * threads() <= len(cores()),
        )

    def fits_together(self) -> bool:
        """Whether memory and cores take both engines at once; one on an accelerator leaves no other room there."""
        on_cpu = str(self.reference_args.get("device", "cpu")) == "cpu"
        return on_cpu and len(cores()) > 1 and COPIES * self.checkpoint.size + BESIDE < free_memory()

    def varied_engine(self, arguments: dict[str, Any], *, hosts: HostPool) -> Any:
        """The candidate with these arguments in place of its own, not started. Raises UsageError.

        Engines on as many ranks share a process, one after the other.
        """
        own = {"tensor_parallel_size": self.tensor_parallel_size, **self.engine_args, **arguments}
        ranks = own.pop("tensor_parallel_size")
        host = hosts.get(f"varied on {ranks * int(own.get('pipeline_parallel_size', 1))}")
        return replace(self, engine_args=own, tensor_parallel_size=ranks).candidate_engine(host)

    def measure_floor(self, *, progress: Progress | None = None) -> FloorFile:
        """The noise floor of the model on these cases; runs the reference twice and no candidate.

        Raises UsageError where there is none to measure.
        """
        reference = self.reference()
        with tempfile.TemporaryDirectory(prefix="paritykit-") as folder:
            reference.prepare(folder=Path(folder), cases=self.resolve_cases(), progress=progress)
            try:
                twin = reference.twin_capture
                if twin is None:
                    raise UsageError(f"there is no noise floor to measure: {reference.no_floor}")
                return floor_of(reference.capture, twin)
            finally:
                reference.close()

    def resolve_cases(self) -> list[Case]:
        """The cases for this model. Raises UsageError."""
        return resolve_cases(self.checkpoint, names=self.case_names, fixed=self.fixed, file=self.cases_file)

    def reference(self, engine: Any = None, *, host: HostProcess | None = None) -> Reference:
        """The reference as truth and, where its noise floor can be measured, as twin; not started.

        ``engine`` is a truth that is there already, which ``reference_engine(host)`` made. Without ``host``, truth and
        twin share a process of their own.
        """
        own = HostProcess() if host is None else None
        shared = host or own
        return Reference(
            truth=self._role(engine, self.truth_arguments(), shared),
            twin=None if self.no_floor else self._role(None, self._twin_arguments(), shared),
            plain=self._role(None, self._twin_arguments(), shared) if self._daring else None,
            no_floor=self.no_floor,
            variants={} if self.no_floor else self._variants(shared),
            host=own,
            store=open_store(self.config["cache"]),
        )

    def reference_engine(self, host: HostProcess | None = None) -> Any:
        """The reference as truth, not started; in ``host``, a process to share, where one is given."""
        return _engine(self.config["reference"], self.checkpoint, self.truth_arguments(), host)

    def truth_arguments(self) -> dict[str, Any]:
        """What the truth's engine is called with: one precision above the candidate, on the weights it has."""
        wanted = self.config["reference_dtype"]
        if wanted == "auto":
            dtype = "float32" if self.no_floor else ABOVE[self._dtype("dtype")]
        else:
            dtype = self._dtype("reference_dtype")
        weights = {} if self.no_floor else {"weights_dtype": self._dtype("dtype")}
        return {"dtype": dtype, **weights, **self.reference_args}

    @cached_property
    def no_floor(self) -> str:
        """Why no noise floor can be measured; empty where it can."""
        name, dtype, wanted = self.config["reference"], self._dtype("dtype"), self.config["reference_dtype"]
        if not self.config["floor"]:
            return f"switched off ({self.config.source('floor')})"
        if name != "hf":
            return f"the reference {name} is not run in two dtypes"
        if "dtype" in self.reference_args or dtype not in ABOVE:
            return f"nothing is run above {self.reference_args.get('dtype', dtype)}"
        if wanted != "auto" and PRECISION[self._dtype("reference_dtype")] <= PRECISION[dtype]:
            return f"the reference ran in {self._dtype('reference_dtype')}, the candidate in {dtype}"
        return ""

    @property
    def _daring(self) -> bool:
        """Whether the truth is in float64 for no other reason than the noise floor: not every model runs in it."""
        return bool(self.config["reference_dtype"] == "auto" and self.truth_arguments()["dtype"] == "float64")

    def _twin_arguments(self) -> dict[str, Any]:
        return {"dtype": self._dtype("dtype"), **self.reference_args}

    def _variants(self, host: HostProcess | None) -> dict[str, Role]:
        """Other ways to run the twin, by what differs."""
        own = self._twin_arguments()
        attention = "sdpa" if own.get("attn_implementation", "eager") == "eager" else "eager"
        padding = "left" if own.get("padding", "none") == "none" else "none"
        changes = {"attn_implementation": attention, "padding": padding}
        return {f"{name}={value}": self._role(None, {**own, name: value}, host) for name, value in changes.items()}

    def _role(self, engine: Any, arguments: dict[str, Any], host: HostProcess | None) -> Role:
        name = self.config["reference"]
        made = _engine(name, self.checkpoint, arguments, host) if engine is None else engine

        def key(cases: list[Case]) -> str:
            return key_of(name, arguments, digest=self.checkpoint.digest, cases=cases)

        return Role(engine=made, key=key if name == "hf" else None)

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
    fixed: Iterable[Case | Written] = (),
    cases_file: str | os.PathLike[str] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    reference_args: Mapping[str, Any] | None = None,
    tensor_parallel_size: int = 1,
    map_file: str | os.PathLike[str] | None = None,
    explain: bool = True,
    local: bool | None = None,
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
        map_file="" if map_file is None else str(map_file),
        explain=explain,
        local=local,
    )


def resolve_cases(
    checkpoint: Checkpoint, *, names: Sequence[str] = (), fixed: Sequence[Case | Written] = (), file: str = ""
) -> list[Case]:
    """The cases for a checkpoint: built-in ones by name and ``fixed`` ones, or a file's, picked by id.

    Raises UsageError.
    """
    if not file:
        return cases_for(checkpoint, CaseSet(names or (() if fixed else ("smoke",)), fixed))
    found = {c.id: c for c in cases_for(checkpoint, CaseSet((), read_cases(file)))}
    for name in names:
        if name not in found:
            raise UnknownNameError(f"case in {file}", name, found)
    return [c for c in found.values() if not names or c.id in names]


def _engine(name: str, checkpoint: Checkpoint, arguments: dict[str, Any], host: HostProcess | None) -> Any:
    if host is not None:
        return ProcessEngine(name, str(checkpoint.path), arguments, host=host)
    return engine(name, str(checkpoint.path), **arguments)
