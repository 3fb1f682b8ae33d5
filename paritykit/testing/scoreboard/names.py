"""What is told by name: every miss, and what could not be measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from paritykit.testing.scoreboard.rates import Note

SECTIONS = {
    "missed": (
        "Faults that were not found",
        "At ten times the noise floor or louder, no check that the fault names failed.",
        "checks that failed, or verdict",
    ),
    "alarm": ("False alarms", "Nothing is wrong with these pairs.", "what was reported"),
    "broken": ("Trials that could not run", "They count for nothing above.", "why"),
    "differs": (
        "Drawn architectures that the engine computes otherwise",
        "Their logits differ, so the pair is none without a fault.",
        "first divergence",
    ),
    "refused": ("Drawn architectures that one of both engines does not run", "They count for nothing above.", "why"),
    "misplaced": (
        "Faults that were placed elsewhere",
        "Found, and another point was named first.",
        "what was named; *near*: within one module",
    ),
    "misexplained": ("Faults that were explained otherwise", "Found, and another cause came first.", "causes named"),
    "alike": (
        "Faults without an effect",
        "The point is another number, and nothing that is computed from it differs.",
        "verdict",
    ),
    "faint": ("Not found at twice the floor", "Cut to twice the noise floor.", "checks that failed, or verdict"),
    "quiet": (
        "Faults that are quieter than ten times the floor",
        "At full strength they are less than ten times the noise floor at their point. They count in the tables only "
        "in the row that says so.",
        "by a check that the fault names",
    ),
    "unmeasured": (
        "Faults whose strength has no number",
        "What they do at full strength is not finite, or shows at no point, so that it was not cut.",
        "",
    ),
}
LEVELS = {"loud": "as it is", "ten": "ten times", "twice": "twice"}


def named_sections(notes: Sequence[Note]) -> list[str]:
    """A heading and a table for each kind of note, those with nothing to tell included."""
    parts = []
    for what, (title, text, said) in SECTIONS.items():
        own = [n for n in notes if n.what == what]
        parts += [f"## {title}", f"{text} {len(own)} trials." if own else "None."]
        if own:
            parts.append(_table(own, said=said))
    return parts


def _table(notes: Sequence[Note], *, said: str) -> str:
    """One row for each name and what was said of it; the trials, with engine, model, dtype, strength and ratio."""
    rows: dict[tuple[str, str, str], list[Note]] = defaultdict(list)
    for note in notes:
        rows[note.name, note.wanted, note.said].append(note)
    lines = [f"| what | wanted | {said or 'said'} | in |", "|---|---|---|---|"]
    for (name, wanted, text), own in sorted(rows.items()):
        where = "; ".join(_trial(n) for n in own)
        cells = (
            f"`{name}`" if own[0].level and own[0].what not in ("alarm", "differs", "refused") else name,
            wanted,
            text,
            where,
        )
        lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|').replace(chr(10), ' ') for c in cells)} |")
    return "\n".join(lines)


def _trial(note: Note) -> str:
    ratio = "" if note.ratio is None else f", {note.ratio:.3g} x"
    return f"{note.engine} {note.model} {note.dtype} {LEVELS.get(note.level, note.level)}{ratio}"
