"""Names of cases by their size, ``len-17+4@b``: written, read, and made smaller. Without Hypothesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from paritykit.case import CaseSet, Recipe, find_recipe

TEXTS = ("a", "b")
"""Cases of one text begin alike, so that prefixes are shared."""


def case_name(length: int, new_tokens: int = 0, text: str = TEXTS[0], *, forced: bool = False) -> str:
    """The name of a sized case; see ``paritykit.case.find_recipe``.

    >>> case_name(17, 2, "b"), case_name(5), case_name(17, 2, "a16b", forced=True)
    ('len-17+2@b', 'len-5', 'len-17+2f@a16b')
    """
    new = f"+{new_tokens}" + "f" * forced if new_tokens else ""
    return f"len-{length}{new}" + (f"@{text}" if text != TEXTS[0] else "")


def numbered(names: Iterable[str]) -> list[str]:
    """``names``, those that come again with a number.

    >>> numbered(["len-5", "len-7", "len-5"])
    ['len-5', 'len-7', 'len-5:2']
    """
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name}:{seen[name]}" if seen[name] > 1 else name)
    return found


def recipes_of(workload: CaseSet) -> list[Recipe]:
    """The recipes of a workload of sized cases."""
    return [found for name in workload.ids() if (found := find_recipe(name)) is not None]


def workload_of(recipes: Iterable[Recipe]) -> CaseSet:
    """Inverse of ``recipes_of``."""
    return CaseSet(numbered(_name_of(r) for r in recipes))


def smaller(recipes: list[Recipe]) -> Iterator[list[Recipe]]:
    """Workloads one step smaller, the boldest steps first: a request less, a shorter prompt, fewer new tokens."""
    for place, recipe in enumerate(recipes):
        before, after = recipes[:place], recipes[place + 1 :]
        if len(recipes) > 1:
            yield [*before, *after]
        yield from ([*before, less, *after] for less in _less(recipe))


def _less(recipe: Recipe) -> Iterator[Recipe]:
    length, new = recipe.length, recipe.new_tokens
    changes: list[dict[str, Any]] = [
        {"length": n} for n in dict.fromkeys((1, 2, length // 2, length - 1)) if 0 < n < length
    ]
    changes += [{"new_tokens": n} for n in dict.fromkeys((0, 1, new - 1)) if 0 <= n < new]
    changes += [{"fork": None}] if recipe.fork else []
    changes += [{"forced": False}] if recipe.forced else []
    changes += [{"text": _PLAIN}] if recipe.text != _PLAIN else []
    yield from (msgspec.structs.replace(recipe, **change) for change in changes)


_PLAIN = f"@{TEXTS[0]}"


def _name_of(recipe: Recipe) -> str:
    text = recipe.text.removeprefix("@")
    text += f"{recipe.fork[0]}{recipe.fork[1].removeprefix('@')}" if recipe.fork else ""
    return case_name(recipe.length, recipe.new_tokens, text, forced=recipe.forced)
