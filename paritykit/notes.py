"""What the verdict of a run does not speak of: what was asked for and never ran, in one sentence each. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from paritykit.case import Case
from paritykit.results import Side


class Ran(NamedTuple):
    """A run as it was: the candidate's side, the model's config, and the cases."""

    candidate: Side
    config: Mapping[str, Any]
    cases: list[Case]


Rule = Callable[[Ran], Iterator[str]]


def adapter(ran: Ran) -> Iterator[str]:
    """Adapters were enabled, and no case names one."""
    if ran.candidate.args.get("enable_lora") == "True":
        yield "enable_lora=true, but no adapter was named: none ran"


def compiled(ran: Ran) -> Iterator[str]:
    """Modules of a compiled graph are not seen."""
    if ran.candidate.args.get("enforce_eager") == "False":
        yield (
            "enforce_eager=false: hooks do not fire in a compiled graph, so modules were not compared there; "
            "logits and tokens were"
        )


def drafts(ran: Ran) -> Iterator[str]:
    """Whether a draft was verified is not told by an engine."""
    if ran.candidate.args.get("speculative_config", "None") not in ("None", ""):
        yield "speculative decoding is on, and whether any drafted token was verified is not known"


def window(ran: Ran) -> Iterator[str]:
    """A sliding window that no case reaches."""
    size = ran.config.get("sliding_window")
    kinds = ran.config.get("layer_types")
    used = ran.config.get("use_sliding_window", True) and (
        not isinstance(kinds, list) or any("sliding" in str(k) for k in kinds)
    )
    longest = max((c.positions for c in ran.cases), default=0)
    if used and isinstance(size, int) and not isinstance(size, bool) and 0 < longest <= size:
        yield f"sliding_window {size} is longer than every case ({longest} positions at most): it never cut anything"


RULES: tuple[Rule, ...] = (adapter, compiled, drafts, window)


def notes_of(ran: Ran) -> Iterable[str]:
    """All notes of a run."""
    return [note for rule in RULES for note in rule(ran)]
