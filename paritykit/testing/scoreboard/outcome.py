"""What is kept of a trial, one line of JSON each, so that a run that broke goes on where it was."""

from __future__ import annotations

from pathlib import Path

import msgspec

from paritykit.errors import UsageError
from paritykit.testing.scoreboard.plan import Trial


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a trial.

    ``ratio`` is the candidate's error over the noise floor at the fault's point, None where no number is measured;
    ``full`` the same at full strength. ``quiet``: the fault does not reach the level, and was not judged at it.
    ``failed`` are the checks that failed, ``found_by`` those of them that the fault names. ``wanted`` is where the
    fault is, as far as the engine shows it, ``named`` what was named; ``exact`` and ``near`` say how that fits, None
    where there is nothing to name. ``alike``: the fault's point was told as one that means something else, for nothing
    that is computed from it differs. ``causes`` are names, the best first; ``unaided`` those from captures alone, where
    the ledger spoke first. ``judges`` says which of the simpler ones would have failed the candidate. ``error``: it
    could not run.
    """

    trial: Trial
    group: str = ""
    strength: float = 1.0
    ratio: float | None = None
    full: float | None = None
    quiet: bool = False
    verdict: str = ""
    failed: list[str] = []
    found_by: list[str] = []
    wanted: str = ""
    named: str = ""
    exact: bool | None = None
    near: bool | None = None
    alike: bool = False
    cause: str = ""
    causes: list[str] = []
    unaided: list[str] = []
    judges: dict[str, bool] = {}
    inconclusive: int = 0
    error: str = ""
    seconds: float = 0.0


class Book:
    """A file of outcomes that grows. A last line that is not whole is cut off. Raises UsageError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
            path.write_bytes(whole[0] + whole[1])
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error

    def add(self, outcome: Outcome) -> None:
        """Write one more, and see to it that it is on disk."""
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(outcome) + b"\n")


def read_outcomes(folder: Path) -> list[Outcome]:
    """All outcomes in the books of ``folder``, one of each trial: the last, or the last that ran.

    A last line that is not whole is passed over. Raises UsageError for another that is no outcome.
    """
    found: dict[str, Outcome] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                outcome = msgspec.json.decode(line, type=Outcome)
            except msgspec.MsgspecError as error:
                raise UsageError(f"{path}, line {number}: not an outcome of this scoreboard: {error}") from error
            if not outcome.error or outcome.trial.id not in found:
                found[outcome.trial.id] = outcome
    return list(found.values())
