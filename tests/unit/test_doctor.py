"""The doctor sees planted broken packages, names what they break, and takes exactly those away."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import venv
from pathlib import Path

import msgspec
import psutil
import pytest
from rich.console import Console

from paritykit import doctor, machine
from paritykit.doctor import Check
from paritykit.errors import ParityError
from paritykit.probes import Probe, probe, probe_all

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"
TORCH = """
class version: cuda, hip = {cuda!r}, None
class cuda:
    device_count = staticmethod(lambda: {gpus})
    get_device_name = staticmethod(lambda index: "planted GPU")
"""


def plant(folder: Path, name: str, source: str, *, version: str = "") -> None:
    """Write package ``name`` into ``folder``; with a version, as pip would have installed it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    if version:
        info = f"{name}-{version}.dist-info"
        (folder / info).mkdir()
        (folder / info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / info / "INSTALLER").write_text("pip\n")
        owned = [f"{name}/__init__.py", f"{info}/METADATA", f"{info}/INSTALLER", f"{info}/RECORD"]
        (folder / info / "RECORD").write_text("".join(f"{file},,\n" for file in owned))


class Sandbox:
    """An interpreter of its own, with nothing installed but what is planted."""

    def __init__(self, folder: Path, *, with_pip: bool = False) -> None:
        venv.create(folder, with_pip=with_pip)
        self.python = str(folder / "bin" / "python")
        asked = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.packages = Path(subprocess.check_output(asked, text=True).strip())

    def torch(self, *, cuda: str | None = None, gpus: int = 0) -> None:
        plant(self.packages, "torch", TORCH.format(cuda=cuda, gpus=gpus), version="2.13.0")

    def examine(self) -> dict[str, Check]:
        return {check.name: check for check in doctor.examine(python=self.python)}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "venv")


@pytest.fixture
def sandbox_with_pip(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "venv", with_pip=True)


def test_broken_companion_is_named_and_only_it_is_uninstalled(sandbox_with_pip: Sandbox) -> None:
    sandbox = sandbox_with_pip
    sandbox.torch()
    plant(sandbox.packages, "torchvision", BROKEN, version="0.28.0")
    plant(sandbox.packages, "torchaudio", "", version="2.11.0")
    plant(sandbox.packages, "transformers", "import torchvision\n", version="5.0")
    found = sandbox.examine()
    assert {n: found[n].status for n in ("torch", "torchvision", "torchaudio", "torchcodec", "transformers")} == {
        "torch": "ok", "torchvision": "bad", "torchaudio": "ok", "torchcodec": "absent", "transformers": "bad",
    }  # fmt: skip
    assert "operator torchvision::nms does not exist" in found["torchvision"].detail
    assert f"{sandbox.python} -m pip uninstall --yes torchvision" in found["torchvision"].fix
    assert "torchvision" in found["transformers"].fix
    assert doctor.exit_code(found.values()) == 3

    assert doctor.fix(found.values(), python=sandbox.python) == ["torchvision"]
    assert sorted(p.name for p in sandbox.packages.glob("torch*") if p.suffix == "") == ["torch", "torchaudio"]
    assert sandbox.examine()["torchvision"].status == "absent"


def test_working_companions_are_left_alone(sandbox: Sandbox) -> None:
    sandbox.torch()
    for name in doctor.COMPANIONS:
        plant(sandbox.packages, name, "", version="1.0")
    found = sandbox.examine()
    assert {found[name].status for name in doctor.COMPANIONS} == {"ok"}
    assert doctor.exit_code(found.values()) == 0
    assert doctor.fix(found.values(), python=sandbox.python) == []


@pytest.mark.parametrize("torch", ["", BROKEN])
def test_a_companion_is_not_blamed_for_its_torch(sandbox: Sandbox, torch: str) -> None:
    if torch:
        plant(sandbox.packages, "torch", torch, version="2.13.0")
    plant(sandbox.packages, "torchvision", "import torch\n", version="0.28.0")
    found = sandbox.examine()
    assert found["torch"].status == ("bad" if torch else "absent")
    assert found["torchvision"].status == "warn"
    assert doctor.fix(found.values(), python=sandbox.python) == []


def test_pip_refusing_is_an_error(sandbox_with_pip: Sandbox) -> None:
    sandbox = sandbox_with_pip
    sandbox.torch()
    plant(sandbox.packages, "torchvision", BROKEN, version="0.28.0")
    found = sandbox.examine()
    (sandbox.packages / "torchvision-0.28.0.dist-info" / "RECORD").unlink()
    with pytest.raises(ParityError, match=r"pip uninstall --yes torchvision failed"):
        doctor.fix(found.values(), python=sandbox.python)


def test_beside_the_real_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs torch")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plant(tmp_path, "torchvision", BROKEN)
    plant(tmp_path, "torchaudio", "")
    asked = {name: doctor.LIBRARIES[name] for name in ("torch", *doctor.COMPANIONS)}
    absent = {name: Probe(name=name, outcome="absent") for name in ("transformers", "vllm")}
    found = {check.name: check for check in doctor.judge(probe_all(asked) | absent)}
    assert found["torch"].status in {"ok", "warn"}
    assert found["torchaudio"].status == "ok"
    assert found["torchvision"].status == "bad"
    assert str(tmp_path / "torchvision") in found["torchvision"].fix
    assert found["torchvision"].removable == ""


def test_this_environment() -> None:
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    found = {check.name: check for check in doctor.examine()}
    assert found["torch"].status in {"ok", "warn"}
    assert found["transformers"].status == "ok"
    assert [name for name in doctor.COMPANIONS if found[name].status == "bad"] == []


@pytest.mark.parametrize(("build", "gpus", "driver", "said"), [
    ("CPU", "", False, "on this CPU machine torch is a CPU build"),
    ("CPU", "", True, "torch is a CPU build although this machine has a GPU"),
    ("CUDA 13.0", "NVIDIA H200", True, "another version of torch, or for another CUDA than this torch's CUDA 13.0"),
])  # fmt: skip
def test_the_condition_on_each_kind_of_machine(
    monkeypatch: pytest.MonkeyPatch, build: str, gpus: str, driver: bool, said: str
) -> None:
    monkeypatch.setattr(machine, "has_nvidia_driver", lambda: driver)
    absent = {name: Probe(name=name, outcome="absent") for name in doctor.LIBRARIES}
    torch = Probe(name="torch", outcome="works", version="2.13.0", facts={"build": build, "gpus": gpus})
    vision = Probe(name="torchvision", outcome="broken", distribution="torchvision", version="0.28.0", error="nms")
    found = {c.name: c for c in doctor.judge(absent | {"torch": torch, "torchvision": vision})}
    assert said in found["torchvision"].detail
    assert found["torch"].status == ("warn" if driver and build == "CPU" else "ok")
    assert f"index for {build}" in found["torchvision"].fix
    assert found["torchvision"].fix.endswith("pip install torch==2.13.0 torchvision")


@pytest.mark.parametrize(("source", "outcome", "said"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "broken", "killed by SIGSEGV"),
    ("import time; time.sleep(600)", "timeout", "no answer within 2 s"),
    ("raise SystemExit(7)", "broken", "exit code 7"),
    ("try:\n  open('/no/such/lib.so')\nexcept OSError as e:\n  raise RuntimeError('cannot load') from e",
     "broken", "RuntimeError: cannot load (caused by FileNotFoundError: "),
    ("print('noise'); print({'installed': 0})", "works", ""),
])  # fmt: skip
def test_imports_that_end_badly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, outcome: str, said: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plant(tmp_path, "planted_library", source)
    found = probe("planted_library", "import planted_library", timeout=2 if outcome == "timeout" else 60)
    assert found.outcome == outcome
    assert said in found.error
    assert found.origin == str(tmp_path / "planted_library" / "__init__.py")


def test_a_folder_in_the_working_directory_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    plant(tmp_path, "planted_library", BROKEN)
    assert probe("planted_library", "import planted_library").outcome == "absent"


def test_no_such_interpreter() -> None:
    with pytest.raises(ParityError, match="cannot run /no/such/python"):
        doctor.examine(python="/no/such/python")


def test_machine_facts(tmp_path: Path) -> None:
    secret = {"VLLM_API_KEY": "hunter2", "VLLM_USE_V1": "1", "HF_HUB_OFFLINE": "1", "PATH": str(tmp_path)}
    assert machine.settings(secret)["detail"] == "VLLM_API_KEY, VLLM_USE_V1=1"
    assert machine.offline(secret)["detail"].startswith("1: only models that are already here")
    assert machine.offline({})["detail"].startswith("not set")
    assert machine.chromium(secret)["status"] == "absent"
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    assert machine.chromium(secret)["detail"] == str(browser)
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t: fpu avx512f amx_bf16\n")
    assert machine.processor(tmp_path / "cpuinfo")["detail"].endswith("avx512f amx_bf16")


@pytest.mark.parametrize(("told", "threads"), [("1", 1), ("3,2", 3), ("", None), ("0", None), ("many", None)])
def test_threads_are_as_many_as_openmp_is_told(told: str, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert machine.threads() == (threads or len(machine.cores()))


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    free = machine.free_memory(tmp_path / "none")
    assert 0 < free <= psutil.virtual_memory().total
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("1500\n")
    assert machine.free_memory(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory(tmp_path) > 500


def test_printed_and_as_json() -> None:
    checks = [
        Check(name="torch", status="ok", detail="2.13.0 [bold]"),
        Check(name="torchvision", status="bad", detail="broken", fix="pip uninstall torchvision", removable="x"),
    ]
    page = io.StringIO()
    doctor.print_checks(checks, console=Console(file=page, width=80))
    text = page.getvalue()
    assert "2.13.0 [bold]" in text
    assert "torchvision: pip uninstall torchvision" in text
    assert msgspec.json.decode(msgspec.json.encode(checks), type=list[Check]) == checks


def test_every_check_of_the_machine_reads_well() -> None:
    found = doctor.machine_checks()
    assert len({check.name for check in found}) == len(found) == 5
    assert all(check.detail for check in found)
    assert Path(sys.executable).name in machine.python_facts(sys.executable)[1]["detail"]
