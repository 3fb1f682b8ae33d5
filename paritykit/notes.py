"""What the verdict of a run does not speak of, in one sentence each: what was asked for and never ran, what failed by
itself. Torch-free.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from paritykit.case import RECIPES, Case
from paritykit.errors import UsageError
from paritykit.results import Side

T = TypeVar("T")


class Ran(NamedTuple):
    """A run as it was: the candidate's side, the model's config, and the cases.

    ``idle`` has, for each router of experts, how many of how many no token was sent to.
    """

    candidate: Side
    config: Mapping[str, Any]
    cases: list[Case]
    idle: Mapping[str, tuple[int, int]] = {}


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


def shortened(ran: Ran) -> Iterator[str]:
    """Named cases that the model's positions cut."""
    cut = [c for c in ran.cases if c.id in RECIPES and len(c.tokens) < RECIPES[c.id].length]
    if cut:
        told = ", ".join(f"{c.id} to {len(c.tokens)} tokens" for c in cut)
        yield f"cases were cut to what the model's positions take: {told}"


def experts(ran: Ran) -> Iterator[str]:
    """Experts that no token was sent to: a fault in one of them does not show."""
    idle, every = (sum(n[k] for n in ran.idle.values()) for k in (0, 1))
    if idle:
        yield f"{idle} of {every} experts were chosen by no token, so nothing is known of them: longer cases reach more"


RULES: tuple[Rule, ...] = (adapter, compiled, drafts, window, shortened, experts)


def notes_of(ran: Ran) -> Iterable[str]:
    """All notes of a run."""
    return [note for rule in RULES for note in rule(ran)]


def attempt(what: str, make: Callable[[], T], instead: T, *, notes: list[str]) -> T:
    """What ``make`` gives; ``instead``, with a note, where it fails: what was compared stands without it.

    A mistake in what was asked for is the user's to know: UsageError goes on.
    """
    try:
        return make()
    except UsageError:
        raise
    except Exception as error:
        notes.append(f"{what} failed, so it says nothing: {type(error).__name__}: {error}{_place(error)}")
        return instead


def _place(error: BaseException) -> str:
    """The innermost line of code of an error, for who reports it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
