"""Writing: bounded memory, whole or not at all, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paritykit.captures.manifest import Segment, merge_parts
from paritykit.captures.reader import Capture
from paritykit.captures.writer import CaptureFolder, PartWriter
from paritykit.case import Case
from paritykit.errors import CaptureFormatError, EngineError, UsageError
from tests.made import Step, write_capture, write_steps

ROOT = Path(__file__).parents[2]
HEAD = """
import resource, sys, time, torch
from pathlib import Path
from paritykit.captures.manifest import Segment
from paritykit.captures.writer import CaptureFolder, PartWriter
from tests.made import write_capture
target = Path(sys.argv[1])
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """400 MB in tensors of 4 MB: the peak stays within a few tensors of what it was after the first."""
    process = start(
        """
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
marks = []
def steps():
    for number in range(100):
        yield [Segment(0, number, 1)], {"m": torch.full((1, 1 << 20), float(number))}
        if number == 3:
            marks.append(peak())
capture = write_capture(target, steps())
print(peak() - marks[0], capture.manifest.files[0].bytes)
""",
        str(tmp_path / "c"),
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    grown, written = map(int, out.split())
    assert written > 400 << 20
    assert grown * 1024 < 40 << 20


def test_a_killed_process_leaves_nothing_that_reads_as_a_capture(tmp_path: Path) -> None:
    process = start(
        """
def steps():
    for number in range(10**6):
        yield [Segment(0, number, 1)], {"m": torch.zeros(1, 4096)}
        if number == 50:
            print("written", flush=True)
        if number > 50:
            time.sleep(0.01)
write_capture(target, steps())
""",
        str(tmp_path / "c"),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    left = list(tmp_path.iterdir())
    assert [p.name for p in left] == [f".c.{process.pid}.partial"]
    for folder in (tmp_path / "c", *left):
        with pytest.raises(CaptureFormatError):
            Capture.open(folder)
    write_capture(tmp_path / "c", [([Segment(0, 0, 1)], {"m": torch.zeros(1, 4)})]).verify()


def test_a_killed_process_whose_header_was_written(tmp_path: Path) -> None:
    """All files finished, and only the manifest missing: still not a capture."""
    with PartWriter(tmp_path) as part:
        write_steps(part, [([Segment(0, 0, 1)], {"m": torch.zeros(1, 4)})])
        part.finish()
    with pytest.raises(CaptureFormatError, match="not a complete capture"):
        Capture.open(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    return folder


@pytest.fixture
def unmounted(small_disk: Path) -> Iterator[Path]:
    yield small_disk
    subprocess.run(["umount", str(small_disk)], check=True)


@pytest.mark.parametrize("size", [1 << 20, 1000])
def test_a_full_disk(unmounted: Path, size: int) -> None:
    """Small tensors fill it from the buffer, a large one in one write."""
    steps = (([Segment(0, n, 1)], {"m": torch.zeros(1, size)}) for n in range(400))
    with pytest.raises(EngineError, match=r"capture to .* failed, nothing was kept: No space left on device"):
        write_capture(unmounted / "c", steps)
    assert list(unmounted.iterdir()) == []


def test_a_disk_that_is_full_only_for_the_manifest(unmounted: Path) -> None:
    """The data fit, the last file does not."""
    cases = [Case(id="a", tokens=tuple(range(200_000)))]
    with pytest.raises(EngineError, match="No space left on device"):
        write_capture(unmounted / "c", [([Segment(0, 0, 1)], {"m": torch.zeros(1, 10_000)})], cases=cases)
    assert list(unmounted.iterdir()) == []


def test_a_file_size_limit(tmp_path: Path) -> None:
    """As a full disk does, for those who may not mount one."""
    process = start(
        """
import signal
from paritykit.errors import EngineError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    write_capture(target, [([Segment(0, n, 1)], {"m": torch.zeros(1, 1 << 16)}) for n in range(50)])
except EngineError as error:
    print(error)
""",
        str(tmp_path / "c"),
    )
    out, err = process.communicate(timeout=60)
    assert "failed, nothing was kept: File too large" in out, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), EngineError("x")], ids=repr)
def test_an_exception_on_the_way(tmp_path: Path, error: BaseException) -> None:
    def steps() -> Iterator[Step]:
        yield [Segment(0, 0, 1)], {"m": torch.zeros(1, 4)}
        raise error

    with pytest.raises(type(error)) as raised:
        write_capture(tmp_path / "c", steps())
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "capture"])
def test_a_target_that_exists_is_left_untouched(tmp_path: Path, kind: str) -> None:
    target, steps = tmp_path / "c", [([Segment(0, 0, 1)], {"m": torch.zeros(1, 4)})]
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        write_capture(target, steps)
    before = sorted((p, p.is_file() and p.read_bytes()) for p in [target, *target.rglob("*")])
    with pytest.raises(UsageError, match="exists already; remove it or choose another folder"):
        write_capture(target, steps)
    assert sorted((p, p.is_file() and p.read_bytes()) for p in [target, *target.rglob("*")]) == before
    assert list(tmp_path.iterdir()) == [target]


def test_the_working_folder_itself_as_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="exists already"), CaptureFolder(Path()):
        pass
    with pytest.raises(UsageError, match="exists already"), CaptureFolder(Path("/")):
        pass


def test_a_target_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="cannot write to"):
        write_capture(tmp_path / "file" / "c", [])


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert write_capture(tmp_path / "some" / "where" / "c", []).points == {}


def test_a_target_that_appears_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "c"

    def steps() -> Iterator[Step]:
        target.mkdir()
        (target / "file").write_text("theirs")
        yield [Segment(0, 0, 1)], {"m": torch.zeros(1, 4)}

    with pytest.raises(EngineError, match="nothing was kept"):
        write_capture(target, steps())
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert (target / "file").read_text() == "theirs"


def test_ranks_keep_their_rows_when_merged(tmp_path: Path) -> None:
    ranks = [[([Segment(0, s, 2)], {"m": torch.full((2, 3), 10.0 * r + s)}) for s in (0, 2)] for r in range(3)]
    capture = write_capture(tmp_path / "c", *ranks)
    assert capture.ranks == 3
    assert [capture.rows("m", "a", rank=r)[:, 0].tolist() for r in range(3)] == [
        [10.0 * r, 10.0 * r, 10.0 * r + 2, 10.0 * r + 2] for r in range(3)
    ]
    assert merge_parts([]).points == []


def test_what_changes_its_kind_is_dropped_with_its_aliases(tmp_path: Path) -> None:
    with PartWriter(tmp_path) as part:
        for width in (4, 5):
            part.step([Segment(0, width, 1)])
            part.record(torch.zeros(1, width), module="m", port="", call=0, kind="M", axes="tokens, features")
            part.alias("m", module="n", port="input", call=0, kind="N")
        found = part.finish()
    assert found.points == []
    assert [(d.point, d.reason) for d in found.dropped] == [
        ("m", "its rows changed from float32 [4] to float32 [5] between steps"),
        ("n#input", "it is the same tensor as m, which was left out"),
    ]


def test_what_is_seen_twice_in_a_step_counts_once(tmp_path: Path) -> None:
    with PartWriter(tmp_path) as part:
        part.step([Segment(0, 0, 1)])
        for value in (1.0, 2.0):
            part.record(torch.full((1, 4), value), module="m", port="", call=0, kind="M", axes="tokens, features")
            part.alias("m", module="n", port="", call=0, kind="N")
        found = part.finish()
    assert [len(p.pieces) for p in found.points] == [1, 1]
    assert found.points[1].source == "m"
