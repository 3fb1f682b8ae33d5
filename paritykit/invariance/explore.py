"""Workloads are drawn until one fails; that one shrinks to the smallest that does."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from paritykit.case import CaseSet
from paritykit.errors import UnknownNameError
from paritykit.sized import case_name, recipes_of, smaller, workload_of

Fails = Callable[[CaseSet], bool]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """How long to look: ``examples`` workloads for each way to run the engine, ``tries`` to shrink one that fails.

    ``thorough`` tries every way to run, otherwise the most telling of each kind. What is ``repeatable`` draws the same
    workloads each time; otherwise they differ, and Hypothesis remembers those that failed.
    """

    examples: int
    tries: int = 300
    thorough: bool = False
    repeatable: bool = True


PROFILES = {
    "ci": Profile(examples=2),
    "deep": Profile(examples=10, thorough=True, repeatable=False),
}
"""Minutes over the tiny models, and an hour."""


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises UnknownNameError."""
    if name not in PROFILES:
        raise UnknownNameError("profile", name, PROFILES)
    return PROFILES[name]


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes that matter to one engine and model: positions in a block, window (0: none), longest text."""

    block_size: int
    window: int
    longest: int


def known_edges(ground: Ground) -> CaseSet:
    """A workload that crosses the edges of block and window at once, for a start: most mistakes show in it."""
    block, window = ground.block_size + 1, ground.window + 1
    found = [(block, 3, "a"), (1, 2, "a"), (window if ground.window else 2 * ground.block_size, 2, "b")]
    return CaseSet(list(dict.fromkeys(case_name(min(n, ground.longest), new, text) for n, new, text in found)))


def smallest_failing(fails: Fails, ground: Ground, *, name: str, profile: Profile) -> CaseSet | None:
    """The smallest workload found for which ``fails`` is true; None where all that were tried are well.

    ``name`` tells the search apart in Hypothesis' database. One that fails only now and then counts as failing.
    """
    first = known_edges(ground)
    failing = first if fails(first) else _search(fails, ground, name=name, profile=profile)
    return None if failing is None else descend(failing, fails, tries=profile.tries)


def descend(workload: CaseSet, fails: Fails, *, tries: int) -> CaseSet:
    """From a workload that fails to one of which no part can be left out or made shorter, in at most ``tries`` runs.

    Hypothesis stops earlier: from the edge of a block it does not step to a length that is none.
    """
    kept = recipes_of(workload)
    while tries > 0:
        for less in smaller(kept):
            tries -= 1
            if fails(workload_of(less)):
                kept = less
                break
            if tries <= 0:
                break
        else:
            break
    return workload_of(kept)


def _search(fails: Fails, ground: Ground, *, name: str, profile: Profile) -> CaseSet | None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Flaky

    from paritykit.strategies import workloads

    failing: list[CaseSet] = []

    def holds(workload: CaseSet) -> None:
        if fails(workload):
            failing.append(workload)
            raise _Failed

    holds.__name__ = holds.__qualname__ = re.sub(r"\W", "_", name)
    drawn = workloads(block_size=ground.block_size, window=ground.window, longest=ground.longest)
    chosen = settings(
        max_examples=profile.examples,
        deadline=None,
        derandomize=profile.repeatable,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    try:
        chosen(given(drawn)(holds))()
    except _Failed:
        return failing[-1]
    except Flaky:
        return min(failing, key=lambda w: len(w.ids()))
    return None


class _Failed(Exception):  # noqa: N818
    """A workload failed."""
