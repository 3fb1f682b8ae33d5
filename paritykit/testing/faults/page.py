"""The table of faults as Markdown, for ``docs/faults.md``: ``python -m paritykit.testing.faults.page`` prints it."""

from __future__ import annotations

from paritykit.testing.faults.table import FAULTS, KINDS, Fault

HEADINGS = {
    "weights": "Weights and their loading",
    "checkpoint": "Checkpoint files and config",
    "rotary": "Rotary embedding and positions",
    "norm": "Norms",
    "attention": "Masks, windows, heads",
    "scale": "Scales and softcaps",
    "activation": "Gates and activations",
    "residual": "Residual stream",
    "embedding": "Embedding and output head",
    "moe": "Experts",
    "parallel": "Several ranks",
    "cache": "KV cache and scheduling",
    "dtype": "Precision",
    "null": "None at all",
}


def markdown() -> str:
    """One table for each kind of fault."""
    faults = [f for _, f in FAULTS.items()]
    return "\n".join(section(kind, [f for f in faults if f.kind == kind]) for kind in KINDS)


def section(kind: str, faults: list[Fault]) -> str:
    """The heading and table of one kind."""
    head = [
        "| name | what is wrong | first shows at | planted in | needs; shows with | seen |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([f"### {HEADINGS[kind]}", "", *head, *map(row, faults), ""])


def row(fault: Fault) -> str:
    """A fault's line."""
    needs = "; ".join([", ".join(n.words for n in fault.needs), fault.when.words]).strip("; ")
    where = f"`{fault.point}`" if fault.point else ""
    planted = f"{fault.stage}: {', '.join(fault.engines)}" + (", graded" if fault.graded else "")
    return f"| `{fault.name}` | {fault.what} | {where} | {planted} | {needs} | {', '.join(fault.seen)} |"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
