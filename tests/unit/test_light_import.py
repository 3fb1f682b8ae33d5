"""A plug-in that is merely installed must not slow anyone's pytest, and a laptop without torch can read a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import paritykit

ROOT = Path(paritykit.__file__).parents[1]
HEAVY = ("torch", "transformers", "vllm", "numpy", "hypothesis")
COLLECT = "import pytest; assert pytest.main(['--collect-only', '-q', '-p', 'paritykit.pytest_plugin', {!r}]) == 0"
TEST_FILE = "def test_nothing(): pass\n"


def heavy_after(statement: str, *, cwd: Path) -> list[str]:
    """Which heavy libraries a fresh interpreter has imported once it has run ``statement``."""
    script = f"{statement}\nimport json, sys\nprint('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("module", [
    "paritykit",
    "paritykit.pytest_plugin",
    "paritykit.cli",
    "paritykit.results, paritykit.config, paritykit.case, paritykit.registry, paritykit.errors",
    "paritykit.reports",
    "paritykit.doctor",
    "paritykit.testing, paritykit.testing.named, paritykit.models",
])  # fmt: skip
def test_import_is_light(module: str, tmp_path: Path) -> None:
    assert heavy_after(f"import {module}", cwd=tmp_path) == []


def test_collecting_with_the_plugin_is_light(tmp_path: Path) -> None:
    (tmp_path / "test_of_theirs.py").write_text(TEST_FILE)
    assert heavy_after(COLLECT.format(str(tmp_path)), cwd=tmp_path) == []


def test_the_probe_sees_a_heavy_import(tmp_path: Path) -> None:
    assert heavy_after("import json", cwd=tmp_path) == []
    assert heavy_after("import json, numpy", cwd=tmp_path) == ["numpy"]


def test_the_probe_sees_a_heavy_import_while_collecting(tmp_path: Path) -> None:
    (tmp_path / "test_of_theirs.py").write_text(f"import numpy\n{TEST_FILE}")
    assert heavy_after(COLLECT.format(str(tmp_path)), cwd=tmp_path) == ["numpy"]


def test_the_probe_sees_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    assert "torch" in heavy_after("import torch", cwd=tmp_path)


def test_public_names_are_not_hidden_by_modules_of_the_same_name(tmp_path: Path) -> None:
    script = "import paritykit as pk, paritykit.case\nfor i in range(2): assert pk.cases('short').ids() == ['short']"
    assert heavy_after(script, cwd=tmp_path) == []
    pytest.importorskip("torch", reason="needs torch")
    script = "import paritykit as pk\nfrom paritykit.captures import reader\nfrom paritykit.comparison import align\n"
    heavy_after(f"{script}assert callable(pk.capture) and callable(pk.compare)", cwd=tmp_path)


def test_the_plugin_is_registered_with_pytest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"paritykit": "paritykit.pytest_plugin"}
