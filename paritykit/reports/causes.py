"""What a cause is, as text for the terminal and as the table of ``docs/causes.md``. Torch-free."""

from __future__ import annotations

import textwrap

from paritykit.diagnose.catalogue import CAUSES, CauseKind

WIDTH = 100


def cause_page(kind: CauseKind) -> str:
    """Everything that is known of one cause, in a few indented lines."""
    fields = [("what", kind.what), ("tested", kind.tested), ("look at", kind.look)]
    fields += [("seen in", ", ".join(kind.seen))] if kind.seen else []
    lines = [f"{kind.code} {kind.name}", ""]
    for label, text in fields:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {label:<9}", subsequent_indent=" " * 11)
    return "\n".join(lines)


def markdown() -> str:
    """The table of all causes, which ``docs/causes.md`` holds."""
    head = ["| code | name | what is wrong | how it is tested | what to look at | seen |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(_row(kind) for _, kind in CAUSES.items()), ""])


def _row(kind: CauseKind) -> str:
    return f"| {kind.code} | `{kind.name}` | {kind.what} | {kind.tested} | {kind.look} | {', '.join(kind.seen)} |"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
