"""What a user is told of an engine's failure: their own line of code first, what is likely, and a log that stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import paritykit
from paritykit.engines.failure import CRASHED, KEPT, crash_of, explain, keep_log
from paritykit.engines.vllm.engine import first_reason

SITE = "/env/lib/python3.11/site-packages"
LIBRARY = f'  File "{SITE}/vllm/worker.py", line 9, in execute\n    run()\n'
OWN = '  File "/home/me/my_pkg/model.py", line 57, in forward\n    return self.act(self.gate_up(x))\n    ^^^^^^^^\n'
DEEPER = f'  File "{SITE}/torch/nn/modules/linear.py", line 134, in forward\n    return F.linear(input)\n'
HEAD = "Traceback (most recent call last):\n"


def test_the_innermost_frame_of_the_users_code() -> None:
    log = f"noise\n{HEAD}{LIBRARY}{OWN}{DEEPER}ValueError: bad shape\n"
    assert explain(log, message="") == ("  at /home/me/my_pkg/model.py:57 in forward: return self.act(self.gate_up(x))")


def test_an_installed_package_of_the_users_is_theirs() -> None:
    log = f'{HEAD}{LIBRARY}  File "{SITE}/my_plugin/lm.py", line 3, in load\n    params[name]\n{DEEPER}ValueError: x\n'
    assert "my_plugin/lm.py:3 in load: params[name]" in explain(log, message="")


def test_a_rank_that_puts_its_name_in_front() -> None:
    lines = f"{HEAD}{LIBRARY}{OWN}AssertionError\n".splitlines()
    log = "\n".join(f"(Worker_TP1 pid=7) ERROR 11-29 [executor.py:1] {line}" for line in lines)
    assert "/home/me/my_pkg/model.py:57 in forward" in explain(log, message="")


def test_the_last_traceback_with_such_a_frame() -> None:
    other = OWN.replace("57", "8")
    first, then, last = (
        f"{HEAD}{other}KeyError: 'a'\n",
        f"{HEAD}{OWN}ValueError: b\n",
        f"{HEAD}{LIBRARY}RuntimeError: c\n",
    )
    log = f"{first}while handling it\n{then}then\n{last}"
    assert "model.py:57" in explain(log, message="")


NEEDED = [f'  File "{SITE}/{f}", line 1, in x\n    y\n' for f in ("pydantic/main.py", "yaml/reader.py", "jinja2/x.py")]


@pytest.mark.parametrize(
    "frames", [LIBRARY, DEEPER, *NEEDED, f'  File "{paritykit.__file__}", line 1, in x\n    y\n', ""]
)
def test_no_frame_is_the_users(frames: str) -> None:
    assert not explain(f"{HEAD}{frames}ValueError: bad\n", message="")


def error_of(code: str) -> str:
    """What torch says when a tuple goes where a tensor belongs."""
    scope = {"x": (torch.ones(2, 2), None), "linear": torch.nn.Linear(2, 2), "torch": torch}
    with pytest.raises((TypeError, AttributeError)) as caught:
        exec(code, scope)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("code", ["linear(x)", "torch.nn.functional.silu(x)", "x.dtype", "x.shape[0]", "x * 2.0"])
def test_a_tuple_is_named(code: str) -> None:
    said = error_of(code)
    assert "likely: a tuple is used as a tensor" in explain(f"{HEAD}{OWN}{said}\n", message=said), said


def test_a_missing_parameter_is_named_where_weights_are_loaded() -> None:
    frame = OWN.replace("in forward", "in load_weights")
    assert "likely: the loader asks for a parameter" in explain(f"{HEAD}{frame}KeyError: 'k'\n", message="")
    assert "likely" not in explain(f"{HEAD}{OWN}KeyError: 'k'\n", message="")


def test_a_log_stays_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    file = keep_log("all of it")
    assert file is not None
    assert file.read_text() == "all of it"
    for number in range(KEPT + 5):
        (file.parent / f"2000{number:02}.log").write_text("old")
    assert keep_log("new") is not None
    assert len(list(file.parent.glob("*.log"))) == KEPT
    assert not (file.parent / "200000.log").exists()


def test_a_log_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    assert keep_log("all of it") is None


def test_a_crash_outside_python_is_told_from_its_innermost_frame() -> None:
    frames = [f'  File "/csrc/rotary.cpp", line {n}, in rotary({n})' for n in range(40)]
    signal = '  File "./signal/libc_sigaction.c", line 0, in 0x7f'
    log = "\n".join(["noise", "!!!!!!! Segfault encountered !!!!!!!", signal, *frames, ""])
    assert crash_of(log).splitlines() == frames[:CRASHED]


@pytest.mark.parametrize("log", ["", "free(): invalid pointer", f"{HEAD}{LIBRARY}{OWN}ValueError: x", "a\nb\nc\n" * 9])
def test_what_is_no_such_crash_is_told_as_it_is(log: str) -> None:
    assert crash_of(log) == ""


def test_an_error_without_a_text_is_told_by_its_line() -> None:
    def choose(kind: str) -> None:
        assert kind == "softmax"

    try:
        choose("sigmoid")
    except AssertionError as error:
        error.args = ()
        kept = error
    assert re.fullmatch(r'AssertionError: test_engine_failure.py:\d+: assert kind == "softmax"', first_reason(kept))
    assert first_reason(ValueError("no such size")) == "no such size"


def test_a_line_without_end_is_cut() -> None:
    told = first_reason(ValueError("unknown: " + "name, " * 5000))
    assert told.startswith("unknown: name, name")
    assert told.endswith(" ...")
    assert len(told) < 500
