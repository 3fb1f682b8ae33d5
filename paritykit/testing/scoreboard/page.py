"""The board as a page: nothing in it but what was counted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from paritykit.errors import UsageError
from paritykit.results import write_whole
from paritykit.testing.drawn.named import DRAWN
from paritykit.testing.faults.page import HEADINGS
from paritykit.testing.named import REAL
from paritykit.testing.scoreboard.judges import JUDGES
from paritykit.testing.scoreboard.method import METHOD
from paritykit.testing.scoreboard.names import named_sections
from paritykit.testing.scoreboard.rates import LEVELS, REQUIRED, Board, Cell, Counts, Pairs, interval, total

COLUMNS = ("found", "exact point", "within one module", "right cause first", "in the top three")


def write_page(board: Board, path: Path) -> None:
    """Write the page, and beside it, as JSON, what it was made of. Raises UsageError."""
    data = msgspec.json.format(msgspec.json.encode(board), indent=1)
    write_whole(path.with_suffix(".json"), data + b"\n")
    write_whole(path, render(board).encode())


def read_board(path: Path) -> Board:
    """What a page was made of. Raises UsageError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Board)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path} holds no scoreboard: {error}") from error


def render(board: Board) -> str:
    """The whole page, Markdown."""
    parts = [
        "# Scoreboard",
        METHOD["opening"],
        *_unfinished(board),
        "## In short",
        short(board),
        "## By strength",
        METHOD["strength"],
        levels_table(board.cells),
        "## By class of fault",
        METHOD["class"],
        class_table(board.cells),
        "## By engine and dtype",
        METHOD["engine"],
        engine_table(board.cells),
        "## Beside simpler judges",
        METHOD["judges"],
        judges_table(board),
        "## Pairs without a fault",
        METHOD["clean"],
        pairs_table(board.pairs),
        *named_sections(board.notes),
        "## How it was measured",
        METHOD["measured"],
        provenance(board),
    ]
    return "\n\n".join(parts) + "\n"


def _unfinished(board: Board) -> list[str]:
    left = board.planned - board.outcomes
    return [f"**Not finished:** {left} of {board.planned} trials have not run."] if left > 0 else []


def short(board: Board) -> str:
    """What was asked for beside what came out."""
    loud = total(board.cells, *REQUIRED)
    real = total(board.cells, "loud")
    tried, failed = sum(p.tried for p in board.pairs), sum(p.failed for p in board.pairs)
    models = {m for names in board.models.values() for m in names}
    drawn, trained = ({m for m in models if m.startswith(prefix)} for prefix in (DRAWN, REAL))
    broken = sum(n.what == "broken" for n in board.notes)
    return table(
        ("what", "wanted", "measured"),
        [
            ("faults", "60 at least", str(len(board.faults))),
            ("tiny models", "6 at least", str(len(models - drawn - trained))),
            ("models with trained weights", "", str(len(trained))),
            (
                "drawn architectures that both engines run alike",
                "",
                str(len(drawn - _told(board, "refused", "differs"))),
            ),
            ("found, at ten times the noise floor or louder", "all", rate(loud.found, loud.tried)),
            ("false alarms on pairs without a fault", "none on 40 at least", rate(failed, tried)),
            ("the exact point named, of those", "95 % at least", rate(loud.exact, loud.placed)),
            ("the right cause first, of faults as they are", "80 % at least", rate(real.first, real.found)),
            ("the right cause first, cut ones included", "", rate(loud.first, loud.found)),
            ("trials that could not run", "", str(broken)),
        ],
    )


def _told(board: Board, *what: str) -> set[str]:
    """The models of these notes."""
    return {n.model for n in board.notes if n.what in what}


def levels_table(cells: list[Cell]) -> str:
    """A row for each strength."""
    rows = [(text, *_counted(total(cells, name))) for name, text in LEVELS.items()]
    return table(("strength", "trials", *COLUMNS), rows)


def class_table(cells: list[Cell]) -> str:
    """A row for each class, at ten times the floor or louder; found at twice in the last column."""
    rows = []
    for group in [g for g in _groups(cells) if any(c.group == g for c in cells)]:
        loud = total(cells, *REQUIRED, group=group)
        real = total(cells, "loud", group=group)
        twice = total(cells, "twice", group=group)
        rows.append((group, *_counted(loud), rate(real.first, real.found), rate(twice.found, twice.tried)))
    return table(("class", "trials", *COLUMNS, "cause first, as it is", "found at twice"), rows)


def engine_table(cells: list[Cell]) -> str:
    """A row for each engine, dtype and strength."""
    kinds = sorted({(c.engine, c.dtype) for c in cells})
    rows = [
        (engine, dtype, text, *_counted(counts))
        for engine, dtype in kinds
        for name, text in LEVELS.items()
        if (counts := total(cells, name, engine=engine, dtype=dtype)).tried
    ]
    return table(("engine", "dtype", "strength", "trials", *COLUMNS), rows)


def judges_table(board: Board) -> str:
    """ParityKit and the simpler judges on the same captures: what each would have failed."""
    columns = [(text, total(board.cells, name)) for name, text in LEVELS.items()]
    clean = {d: [p for p in board.pairs if p.dtype == d] for d in sorted({p.dtype for p in board.pairs})}
    rows = [
        (
            "ParityKit",
            *(rate(c.found, c.tried) for _, c in columns),
            *(rate(sum(p.failed for p in own), sum(p.tried for p in own)) for own in clean.values()),
        )
    ]
    for name, asks in JUDGES.items():
        rows.append(
            (
                asks,
                *(rate(c.judges.get(name, 0), c.judged) for _, c in columns),
                *(rate(sum(p.judges.get(name, 0) for p in own), sum(p.judged for p in own)) for own in clean.values()),
            )
        )
    return table(("judge", *(f"faults {t}" for t, _ in columns), *(f"no fault, {d}" for d in clean)), rows)


def pairs_table(pairs: list[Pairs]) -> str:
    """A row for each engine, dtype and number of ranks."""
    found = sorted(pairs, key=lambda p: (p.kind, p.engine, p.dtype, p.ranks))
    rows = [
        (
            "nothing planted" if p.kind == "clean" else "null faults",
            p.engine,
            p.dtype,
            str(p.ranks),
            str(p.tried),
            rate(p.failed, p.tried),
            str(p.inconclusive),
        )
        for p in found
    ]
    return table(("pair", "engine", "dtype", "ranks", "pairs", "false alarms", "inconclusive"), rows)


def provenance(board: Board) -> str:
    """Versions and amounts."""
    models = "; ".join(f"{engine}: {', '.join(names)}" for engine, names in board.models.items())
    rows = [*board.versions.items(), ("trials", str(board.outcomes)), ("models", models)]
    rows.append(("time of all trials", f"{board.seconds / 60:.0f} minutes of one core"))
    return table(("", ""), rows)


def rate(part: int, whole: int) -> str:
    """A share with its count and interval.

    >>> rate(8, 10)
    '80.0 % (8/10; 49.0 to 94.3)'
    """
    if not whole:
        return "none tried"
    low, high = interval(part, whole)
    return f"{100 * part / whole:.1f} % ({part}/{whole}; {100 * low:.1f} to {100 * high:.1f})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _counted(counts: Counts) -> tuple[str, ...]:
    return (
        str(counts.tried),
        rate(counts.found, counts.tried),
        rate(counts.exact, counts.placed),
        rate(counts.near, counts.placed),
        rate(counts.first, counts.found),
        rate(counts.three, counts.found),
    )


def _groups(cells: list[Cell]) -> list[str]:
    """Classes in the order of the fault table, those of other packages after them."""
    known = list(HEADINGS.values())
    return known + sorted({c.group for c in cells} - set(known))
