"""Commands of the command line, run in the test's own process: a traceback there fails the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from paritykit.cli import execute

OWN = "tests.integration.own_engines:"


class Outcome:
    """What a command returned and printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def message(self) -> str:
        """What it said on standard error, which is all it said; no traceback, from any process."""
        assert self.out == ""
        assert "Traceback" not in self.err
        return self.err.removeprefix("paritykit: ").strip()


class Attempt:
    """``attempt("run", model, "--candidate", "hf")``."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Outcome:
        self._capfd.readouterr()
        code = execute([str(a) for a in arguments])
        return Outcome(code, *self._capfd.readouterr())


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def shadow(folder: Path, package: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started from now on find this in place of the real ``package``."""
    write(folder / package / "__init__.py", code)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
