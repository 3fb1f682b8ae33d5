"""The matrix as a page: nothing in it but what the rows say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.matrix.row import Row
from paritykit.results import write_whole

ORDER = ("pass", "fail", "inconclusive", "refused", "could not run", "not drawn", "error")
OPENING = """\
Each causal language model of the installed Transformers that the installed vLLM takes, with a class of its own or in
its Transformers backend, as a clean pair: a tiny seeded model, drawn from the config class alone
(`paritykit run drawn:cohere --candidate vllm --dtype float32` runs one again), the reference of Hugging Face against
vLLM on a CPU. `tox run -e matrix` makes this page."""
MEANING = """\
*pass*: the same model. *fail*: something differs; where logits and tokens agree it is marked as a *false alarm*.
*refused*: one of the engines says that it does not run this; what a class of vLLM's own refuses is tried in its
Transformers backend too, which then stands in the column of vLLM. *could not run*: an engine died or took too long,
which says nothing of what it computes. *not drawn*: no small config of the class was found that works by itself.
*error*: a mistake of ParityKit's own."""


def write_page(rows: Sequence[Row], classes: Mapping[str, str], path: Path, *, planned: int = 0) -> None:
    """Write the page. ``classes`` are vLLM's, by ``model_type``. Raises UsageError."""
    write_whole(path, render(rows, classes, planned=planned).encode())


def render(rows: Sequence[Row], classes: Mapping[str, str], *, planned: int = 0) -> str:
    """The whole page, Markdown."""
    short = planned - len(rows)
    unfinished = [f"**Not finished:** {short} of {planned} pairs have not run."] if short > 0 else []
    parts = ["# Matrix", OPENING, *unfinished, "## In short", counts(rows), MEANING, "## Every architecture"]
    sources = ", ".join(f"`{s}`" for s in sorted({r.source for r in rows}))
    return "\n\n".join([*parts, matrix(rows, classes), f"Source of ParityKit: {sources or 'none'}."]) + "\n"


def counts(rows: Sequence[Row]) -> str:
    """How many of each outcome, by dtype."""
    dtypes = _dtypes(rows)
    found = {d: Counter(r.outcome for r in rows if r.task.dtype == d) for d in dtypes}
    alarms = {d: sum(r.false_alarm for r in rows if r.task.dtype == d) for d in dtypes}
    body = [(name, *(str(found[d][name]) for d in dtypes)) for name in ORDER]  # type: ignore[index]
    body.insert(2, ("of these with equal logits and tokens", *(str(alarms[d]) for d in dtypes)))
    return _table(("outcome", *dtypes), [*body, ("together", *(str(found[d].total()) for d in dtypes))])


def matrix(rows: Sequence[Row], classes: Mapping[str, str]) -> str:
    """A row for each architecture."""
    dtypes = _dtypes(rows)
    own = {(r.task.model_type, r.task.dtype): r for r in rows}
    body = []
    for kind in sorted({r.task.model_type for r in rows}):
        found = [own.get((kind, d)) for d in dtypes]
        there = [r for r in found if r is not None]
        shown = [_outcome(r) if r else "" for r in found]
        ran = _joined([r.backend or classes.get(kind, "") for r in there])
        body.append((f"`{kind}`", there[0].architecture, ran, *shown, _first(there), _reason(there)))
    return _table(("model type", "Transformers", "vLLM", *dtypes, "first divergence", "reason"), body)


def _dtypes(rows: Iterable[Row]) -> list[str]:
    return sorted({r.task.dtype for r in rows}, reverse=True, key=lambda d: (d == "float32", d))


def _outcome(row: Row) -> str:
    if row.outcome in ("pass", "fail", "inconclusive"):
        of = f" {row.failed} of {row.compared}" if row.failed else ""
        return f"{row.outcome}{of}{', a false alarm' if row.false_alarm else ''}"
    return row.outcome


def _first(rows: Iterable[Row]) -> str:
    return _joined(f"`{r.first}`" for r in rows if r.first)


def _reason(rows: Iterable[Row]) -> str:
    """Reasons of what gave no verdict, those of vLLM's own class too, and the first cause of a failure."""
    said: list[str] = []
    for row in rows:
        said.append(f"own class refuses: {row.refusal}" if row.refusal else "")
        said.append(row.reason if row.outcome not in ("pass", "fail") else next(iter(row.causes), ""))
    return _joined(s.replace("|", "\\|").replace("<", "&lt;") for s in said)


def _joined(parts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(p for p in parts if p))


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])
