"""An audit on the terminal: the worst first, and what each engine will do. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from paritykit.reports.wording import count, visible

if TYPE_CHECKING:
    from paritykit.audit.notice import Audit, Notice

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "dim"}


def print_audit(audit: Audit, *, console: Console, verbose: bool = False) -> None:
    """Print errors and warnings with their consequences, and how much was looked at; ``verbose`` adds the notes."""
    shown = audit.notices if verbose else [*audit.errors, *audit.warnings]
    for notice in shown:
        _print_notice(notice, console)
    notes = len(audit.notices) - len(audit.errors) - len(audit.warnings)
    word, style = ("FAIL", "bold red") if audit.errors else ("PASS", "bold green")
    head = Text(f"{word}  ", style=style)
    head.append(f"{count(len(audit.errors), 'error')}, {count(len(audit.warnings), 'warning')}, {count(notes, 'note')}")
    _print(console, head)
    how = "every byte" if audit.deep else "headers only"
    size = f"{count(len(audit.files), 'weight file')}, {count(audit.tensors, 'tensor')}, {audit.bytes / 1e6:,.1f} MB"
    _print(
        console, Text(f"  {size}; {how}, {audit.seconds:.1f} s" + ("" if verbose or not notes else "; notes with -v"))
    )


def _print_notice(notice: Notice, console: Console) -> None:
    head = Text(f"{notice.severity:<8}", style=STYLES[notice.severity])
    _print(console, head.append(f" {notice.code}  ", style="bold").append(visible(notice.place)))
    lines = (("", notice.message), ("hf", notice.hf), ("vllm", notice.vllm), ("next", notice.fix))
    for label, text in lines:
        if text:
            _print(console, Text(f"  {label:<6}", style="dim").append(visible(text), style="not dim"))


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False)
