"""Facts about the machine and the environment, cheap to get and in need of no library.

Each function that returns a ``Fact`` gives the fields of a doctor's check: ``name``, ``status``, ``detail`` and, where
there is one, ``fix``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypedDict

import psutil

GIB = 1 << 30
CGROUP = Path("/sys/fs/cgroup")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


class _Required(TypedDict):
    name: str
    status: Literal["ok", "warn", "bad", "absent"]
    detail: str


class Fact(_Required, total=False):
    """The fields of one check."""

    fix: str


def python_facts(python: str) -> list[Fact]:
    """ParityKit's own version, the interpreter that runs it, and ``python``, whose libraries are examined."""
    try:
        version = importlib.metadata.version("paritykit")
    except importlib.metadata.PackageNotFoundError:
        version = "a source tree, not installed"
    other = "" if python == sys.executable else f"; libraries of {python}"
    return [
        {"name": "paritykit", "status": "ok", "detail": version},
        {"name": "python", "status": "ok", "detail": f"{platform.python_version()} at {sys.executable}{other}"},
    ]


def chromium(environ: Mapping[str, str]) -> Fact:
    """The browser that the report tests open."""
    found = next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in BROWSERS)), None)
    if found:
        return {"name": "chromium", "status": "ok", "detail": found}
    detail = "not found; only tests that open a report in a browser need it"
    return {"name": "chromium", "status": "absent", "detail": detail, "fix": "apt-get install chromium"}


def cache() -> Fact:
    """The Hugging Face cache, where models and reference captures go, and the space left there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free / GIB
    detail = f"{folder} ({free:.0f} GiB free)"
    if not os.access(there, os.W_OK):
        advice = "choose a folder that you may write to: HF_HOME=FOLDER"
        return {"name": "cache", "status": "warn", "detail": f"{detail}, not writable", "fix": advice}
    if free < 5:
        return {"name": "cache", "status": "warn", "detail": detail, "fix": "make room, or set HF_HOME=FOLDER"}
    return {"name": "cache", "status": "ok", "detail": detail}


def offline(environ: Mapping[str, str]) -> Fact:
    """Whether models may be fetched from the hub."""
    value = environ.get("HF_HUB_OFFLINE", "")
    closed = value.upper() in {"1", "ON", "YES", "TRUE"}
    meaning = "only models that are already here" if closed else "hub ids may be downloaded"
    return {"name": "HF_HUB_OFFLINE", "status": "ok", "detail": f"{value or 'not set'}: {meaning}"}


def settings(environ: Mapping[str, str]) -> Fact:
    """The VLLM_* variables in force, secrets left out: they change what vLLM does."""
    found = sorted(name for name in environ if name.startswith("VLLM_"))
    shown = [name if name.endswith(SECRETS) else f"{name}={environ[name]}" for name in found]
    return {"name": "VLLM_*", "status": "ok", "detail": ", ".join(shown) or "none set"}


def free_memory(group: Path = CGROUP) -> int:
    """Bytes that may still be taken: what the machine has, and what the control group's limit leaves of it."""
    free = int(psutil.virtual_memory().available)
    try:
        most, now = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return min(free, int(most) - int(now))
    except (OSError, ValueError):  # no such file system, or a limit of "max"
        return free


def cores() -> list[int]:
    """The cores that this process may use, by number."""
    return sorted(psutil.Process().cpu_affinity() or [])


def threads() -> int:
    """How many threads an engine computes with on a CPU: as ``OMP_NUM_THREADS`` says, or one for each core.

    Two engines at once that have more threads than cores wait on each other's: they took 1.6 times as long as one
    after the other.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(told) if told.isdecimal() and int(told) else len(cores())


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Fact:
    """Cores, memory, and the instruction sets that choose vLLM's kernels on a CPU."""
    flags = _flags(cpuinfo)
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    memory = psutil.virtual_memory().total / GIB
    detail = f"{len(cores())} cores, {memory:.0f} GiB, {' '.join(sets) or platform.machine()}"
    return {"name": "cpu", "status": "ok", "detail": detail}


def has_nvidia_driver() -> bool:
    """Whether the kernel drives an NVIDIA GPU, asked without torch."""
    return Path("/proc/driver/nvidia/version").exists()


def _flags(cpuinfo: Path) -> set[str]:
    if not cpuinfo.is_file():
        return set()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(found.partition(":")[2].split())
