"""Engines in processes of their own: what they say is heard, and nothing of them is left, however the run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from paritykit.audit import Audit, audit
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.cli import execute
from paritykit.engines.process import HostProcess, ProcessEngine
from paritykit.errors import EngineError, UnknownNameError, UsageError
from paritykit.plan import make_plan
from paritykit.reference import Reference, Role
from paritykit.session import Session
from paritykit.testing import tiny_model
from tests.integration.own_engines import MARK

OWN = "tests.integration.own_engines:"
CASES = [Case(id="a", tokens=(1, 2, 3), new_tokens=2)]
SOON = 20.0
STUCK = (2, 3)
"""Processes of a run whose reference is stuck: the reference and its fork, and the candidate where memory takes it."""
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from paritykit.cli import main
main()
"""
"""The command line, minding Ctrl-C: where the tests run in the background it is ignored, and children inherit that."""

Command = Callable[..., subprocess.Popen[str]]


def wait_for(condition: Callable[[], bool], *, what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mark"
    monkeypatch.setenv(MARK, str(path))
    return path


@pytest.fixture
def model() -> str:
    return str(tiny_model("qwen2"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command's temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def command(importable: None) -> Iterator[Command]:
    """Starts the command line in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", START, *arguments]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def shared_by(processes: list[psutil.Process]) -> set[Path]:
    """The files in shared memory that ``processes`` have mapped or open, by name: mounts may show other folders."""
    seen = ""
    for process in processes:
        folder = Path(f"/proc/{process.pid}")
        with contextlib.suppress(OSError):
            seen += (folder / "maps").read_text()
        with contextlib.suppress(OSError):
            seen += "\n".join(os.readlink(link) for link in (folder / "fd").iterdir())
    return {p for p in Path("/dev/shm").iterdir() if p.name in seen}


def ranks_sharing(start: Callable[[], subprocess.Popen[str]]) -> tuple[subprocess.Popen[str], set[Path]]:
    """A run whose two ranks share memory, and what they share.

    A second try where the first does not come up (ranks look for a free port, and another engine may take it); skipped
    on a machine that does not show who holds what.
    """
    output = ""
    for _ in range(2):
        process = start()
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(shared := shared_by(family_of(process))) >= 4:
                return process, shared
            time.sleep(0.05)
        if process.poll() is None:
            pytest.skip(f"{len(family_of(process))} processes, but their shared memory is not to be seen here")
        output = process.communicate()[0]
    pytest.fail(f"two ranks do not start: {output}")


def captures_in(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if "paritykit" in p.name or "partial" in p.name or "rank0" in p.name]


@pytest.mark.parametrize("engine", ["stuck_opening", "stuck_running"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing(
    command: Command, mark: Path, scratch: Path, model: str, *, engine: str, how: int
) -> None:
    process = command("run", model, "--reference", OWN + engine, "--candidate", "hf")
    wait_for(mark.exists, what="the engine is stuck")
    family = family_of(process)
    assert len(alive(family)) in STUCK
    assert bool(list(scratch.rglob("*.partial"))) == (engine == "stuck_running")
    process.send_signal(how)
    output, _ = process.communicate(timeout=SOON)
    assert process.returncode == 3
    assert output.strip() == "paritykit: interrupted; engines were stopped and nothing was written"
    assert alive(family) == []
    assert captures_in(scratch) == []


def test_interrupted_capture_leaves_nothing(command: Command, mark: Path, tmp_path: Path, model: str) -> None:
    target = tmp_path / "captures" / "mine"
    process = command("capture", OWN + "stuck_running", model, "-o", str(target))
    wait_for(mark.exists, what="the engine is stuck")
    assert len(list(target.parent.iterdir())) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SOON)
    assert process.returncode == 3
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("engine", ["stuck_opening", "stuck_running"])
def test_killed_run_leaves_no_process(command: Command, mark: Path, scratch: Path, model: str, engine: str) -> None:
    process = command("run", model, "--reference", OWN + engine, "--candidate", "hf")
    wait_for(mark.exists, what="the engine is stuck")
    family = family_of(process)
    assert len(alive(family)) in STUCK
    process.kill()
    wait_for(lambda: alive(family) == [], what="the engine's processes are gone", seconds=SOON)


def test_interrupted_ranks_leave_no_process_and_no_shared_memory(command: Command, scratch: Path, model: str) -> None:
    cases = scratch / "cases.jsonl"
    cases.write_text('{"id": "long", "tokens": [1, 2, 3], "new_tokens": 500}')
    arguments = ("--engine-arg", "tensor_parallel_size=2", "--cases", str(cases))
    process, shared = ranks_sharing(
        lambda: command("capture", "vllm", model, "-o", str(scratch / "capture"), *arguments)
    )
    family = family_of(process)
    assert len(alive(family)) > 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SOON)
    assert process.returncode == 3
    assert alive(family) == []
    assert [p for p in shared if p.exists()] == []
    assert captures_in(scratch) == []


def test_engine_that_dies_leaves_its_last_words(
    mark: Path, scratch: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["capture", OWN + "dying", model, "-o", str(scratch / "capture")]) == 3
    message = capsys.readouterr().err
    assert "the engine's process died of signal 9; its last words:\n  no more memory for layer 3" in message
    assert list(scratch.iterdir()) == []


def test_shared_process_that_died_is_not_started_to_close_an_engine(mark: Path, tmp_path: Path, model: str) -> None:
    host = HostProcess()
    engine = ProcessEngine(OWN + "dying", model, {}, host=host)
    engine.open()
    assert host.running
    with pytest.raises(EngineError, match="died of signal 9"):
        engine.run(CASES, points=Selection(), out=tmp_path / "capture")
    engine.close()
    assert not host.running


def test_interrupt_while_waiting_ends_the_process(mark: Path, tmp_path: Path, model: str) -> None:
    seen: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        wait_for(mark.exists, what="the engine is stuck")
        raise KeyboardInterrupt

    others = set(psutil.Process().children(recursive=True))
    host = HostProcess()
    engine = ProcessEngine(OWN + "stuck_running", model, {}, host=host)
    engine.open()
    family = [p for p in psutil.Process().children(recursive=True) if p not in others]
    assert family
    with pytest.raises(KeyboardInterrupt):
        engine.run(CASES, points=Selection(), out=tmp_path / "capture", progress=interrupt)
    assert seen == [("stuck", 0, 1)]
    assert not host.running
    assert alive(family) == []
    assert list(tmp_path.glob(".capture*")) == []


def test_one_process_opens_engines_one_after_another(hosts: dict[str, HostProcess], tmp_path: Path, model: str) -> None:
    for dtype in ("float32", "bfloat16"):
        engine = ProcessEngine("hf", model, {"dtype": dtype}, host=hosts["hf"])
        engine.open()
        assert engine.describe().dtype == dtype
        capture = engine.run(CASES, points=Selection(["lm_head"]), out=tmp_path / dtype)
        assert list(capture.points) == ["lm_head"]
        assert {p.dtype for p in capture.manifest.points} == {dtype}
        engine.close()
        with pytest.raises(EngineError, match="is not open"):
            engine.describe()
    assert hosts["hf"].running


def test_errors_keep_their_kind(hosts: dict[str, HostProcess], tmp_path: Path, model: str) -> None:
    with pytest.raises(UsageError, match="padding must be 'none' or 'left', not 'right'"):
        ProcessEngine("hf", model, {"padding": "right"}, host=hosts["hf"]).open()
    with pytest.raises(UnknownNameError, match="unknown dtype 'float31'; did you mean 'float32'"):
        ProcessEngine("hf", model, {"dtype": "float31"}, host=hosts["hf"]).open()
    with pytest.raises(UsageError, match="no_such_module"):
        ProcessEngine("no_such_module:make", model, {}, host=hosts["hf"]).open()
    with pytest.raises(
        EngineError, match=r"ZeroDivisionError: a defect of the factory\n  at .*own_engines\.py:\d+ in defective: raise"
    ) as caught:
        ProcessEngine(OWN + "defective", model, {}, host=hosts["hf"]).open()
    log = Path(str(caught.value).rpartition("whole log: ")[2])
    assert "ZeroDivisionError: a defect of the factory" in log.read_text()
    assert hosts["hf"].running


def test_an_engine_that_was_begun_loads_while_others_work(mark: Path, tmp_path: Path, model: str) -> None:
    host = HostProcess()
    engine = ProcessEngine("hf", model, {"dtype": "float32"}, host=host)
    engine.begin()
    engine.begin()  # it is at work already
    engine.open()
    assert engine.describe().dtype == "float32"
    assert engine.run(CASES, points=Selection(["lm_head"]), out=tmp_path / "capture").points
    host.stop()


def test_an_engine_that_was_begun_tells_its_error_when_it_is_opened(model: str) -> None:
    engine = ProcessEngine("hf", model, {"padding": "right"})
    engine.begin()
    with pytest.raises(UsageError, match="padding must be 'none' or 'left', not 'right'"):
        engine.open()
    engine.close()
    assert not engine.host.running


def test_closing_an_engine_that_was_begun_ends_it(mark: Path, model: str) -> None:
    others = set(psutil.Process().children(recursive=True))
    engine = ProcessEngine(OWN + "stuck_opening", model, {})
    engine.begin()
    family = [p for p in psutil.Process().children(recursive=True) if p not in others]
    assert family
    wait_for(mark.exists, what="the engine is stuck")
    engine.close()
    assert alive(family) == []


def test_an_engine_is_not_begun_in_a_process_at_work(hosts: dict[str, HostProcess], model: str) -> None:
    first = ProcessEngine("hf", model, {"dtype": "float32"}, host=hosts["hf"])
    first.open()
    second = ProcessEngine("hf", model, {"dtype": "bfloat16"}, host=hosts["hf"])
    second.begin()
    assert first.describe().dtype == "float32"
    first.close()
    second.open()
    assert second.describe().dtype == "bfloat16"
    second.close()


def test_a_reference_that_fails_ends_the_candidate_that_was_begun(mark: Path, tmp_path: Path, model: str) -> None:
    candidate = ProcessEngine(OWN + "stuck_opening", model, {})
    reference = ProcessEngine(OWN + "defective", model, {})
    session = Session(reference=reference, candidate=candidate, cases=CASES, together=True)
    with pytest.raises(EngineError, match="a defect of the factory"), session:
        session.results(["modules"])
    assert not candidate.host.running


def test_a_twin_that_fails_ends_the_candidate_that_runs_beside_it(mark: Path, tmp_path: Path, model: str) -> None:
    candidate, host = ProcessEngine(OWN + "stuck_running", model, {}), HostProcess()
    reference = Reference(
        truth=Role(engine=ProcessEngine("hf", model, {"dtype": "float32"}, host=host)),
        twin=Role(engine=ProcessEngine(OWN + "defective", model, {}, host=host)),
        host=host,
    )
    session = Session(reference=reference, candidate=candidate, cases=CASES, together=True, beside=True)
    with pytest.raises(EngineError, match="a defect of the factory"), session:
        session.results(["modules"])
    assert not candidate.host.running
    assert not host.running


def test_a_candidate_that_dies_beside_the_twin_tells_so(mark: Path, model: str) -> None:
    candidate, host = ProcessEngine(OWN + "dying", model, {}), HostProcess()
    roles = [Role(engine=ProcessEngine("hf", model, {"dtype": d}, host=host)) for d in ("float32", "bfloat16")]
    reference = Reference(truth=roles[0], twin=roles[1], host=host)
    session = Session(reference=reference, candidate=candidate, cases=CASES, together=True, beside=True)
    with pytest.raises(EngineError, match="no more memory for layer 3"), session:
        session.results(["modules"])


def test_a_run_beside_gives_what_one_after_the_other_does(model: str) -> None:
    found = []
    for beside in (False, True):
        plan = make_plan(model, given={"candidate": "nano", "dtype": "float32", "cache": "off"}, case_names=["short"])
        session = plan.open()
        session._together, session._beside = True, beside
        with session:
            results = session.results(plan.checks)
        found.append([(f.check, f.point, f.verdict, f.value, f.local and f.local.value) for f in results.findings])
        assert results.summary.verdict == "pass"
        assert results.run.starts == {"reference": 1, "twin": 1, "candidate": 1}
    assert found[0] == found[1]
    assert {check for check, *_ in found[0]} == set(plan.checks)


def test_functions_are_called_where_the_engine_is(hosts: dict[str, HostProcess], tmp_path: Path, model: str) -> None:
    said: list[str] = []
    target, arguments = "paritykit.audit.run:audit", {"folder": model}
    found = hosts["hf"].compute(
        target, arguments, kind=Audit, folder=tmp_path, progress=lambda what, done, total: said.append(what)
    )
    assert msgspec.structs.replace(found, seconds=0.0) == msgspec.structs.replace(audit(model), seconds=0.0)
    assert said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no_such_folder"):
        hosts["hf"].compute(target, {"folder": "no_such_folder"}, kind=Audit, folder=tmp_path)
