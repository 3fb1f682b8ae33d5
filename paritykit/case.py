"""Cases: the inputs both engines get, and the named sets that ship with ParityKit.

A case is token ids and what follows them. Built-in cases are recipes: they draw seeded token ids over the whole
vocabulary of the model they meet (the last id included), so that one name works for every model. Those of the set
``text`` are real text instead, for a model that has a tokenizer.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from paritykit.errors import UnknownNameError, UsageError
from paritykit.passages import PASSAGES, Message, Passage, Tokenizer


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One input.

    ``tokens`` is the prompt; ``new_tokens`` how many are generated greedily after it; ``forced`` the ids fed instead
    of the engine's own choices (teacher forcing; at most ``new_tokens`` of them). Cases of one ``batch`` are
    submitted together, batches one after the other. Computed positions: ``len(tokens) + new_tokens - 1``, or
    ``len(tokens)`` where nothing is generated (the last new token is never fed back).
    """

    id: str
    tokens: tuple[int, ...]
    new_tokens: int = 0
    batch: int = 0
    forced: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Number of positions an engine computes for this case."""
        return len(self.tokens) + max(self.new_tokens - 1, 0)

    def force(self, generated: Iterable[int]) -> Case:
        """This case with ``generated`` fed in place of the engine's own choices."""
        return msgspec.structs.replace(self, forced=tuple(generated)[: self.new_tokens])


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """A case that is text, or a chat, until it meets a tokenizer; ``where`` it was written, for messages."""

    id: str
    passage: Passage
    new_tokens: int = 0
    batch: int = 0
    forced: tuple[int, ...] = ()
    where: str = ""

    def read(self, tokenizer: Tokenizer | None, *, max_tokens: int | None = None) -> Case:
        """The case in a model's token ids, the first ``max_tokens`` of them. Raises UsageError where it has no
        tokenizer, or one that refuses the text.
        """
        where = self.where or f"case {self.id!r}"
        if tokenizer is None:
            kind = "messages" if self.passage.messages else "text"
            raise UsageError(f'{where}: "{kind}" needs a tokenizer, and this model has none; give "tokens"')
        try:
            tokens = tuple(self.passage.tokens(tokenizer)[:max_tokens])
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        return Case(id=self.id, tokens=tokens, new_tokens=self.new_tokens, batch=self.batch, forced=self.forced)


SIZED = re.compile(r"len-(\d+)(?:\+(\d+)(f?))?(?:@(?:([a-z]+)(\d+)([a-z]+)|(\w+)))?(?::\d+)?")
EDGES = 11
"""Among so many tokens of a sized case one is the vocabulary's last, and one lies at the edge of a shard."""
SHARDS = (2, 4)
PADDING = 64


class Recipe(msgspec.Struct, frozen=True):
    """A built-in case before it meets a model: prompt length, generated tokens, batch.

    Where there is a ``text``, cases of the same text begin alike: the shorter is a prefix of the longer. With a
    ``fork`` the text goes on as another one from that position on. ``forced``: what follows the prompt is not chosen by
    the engine but goes on with the text.
    """

    length: int
    new_tokens: int = 8
    batch: int = 0
    text: str = ""
    fork: tuple[int, str] | None = None
    forced: bool = False

    def draw(self, name: str, *, vocab_size: int, max_positions: int | None = None) -> Case:
        """The case for a model: seeded ids in ``[0, vocab_size)``, the last id among them unless there is only one.

        Shortened to fit ``max_positions`` where the model is too small for it.
        """
        new = self.new_tokens
        length = self.length if max_positions is None else max(1, min(self.length, max_positions - new))
        if self.text:
            tokens = self._written(length + new, vocab_size)
        else:
            rng = random.Random(f"{name}/{vocab_size}")
            tokens = [rng.randrange(vocab_size) for _ in range(length)]
            if length > 1:
                tokens[length // 2] = vocab_size - 1
        forced = tuple(tokens[length:]) if self.forced else ()
        return Case(id=name, tokens=tuple(tokens[:length]), new_tokens=new, batch=self.batch, forced=forced)

    def _written(self, count: int, vocab_size: int) -> list[int]:
        """The first tokens of the text. Behind a fork the first one differs for sure."""
        tokens = write_text(self.text, count, vocab_size=vocab_size)
        if self.fork is None or self.fork[0] >= count:
            return tokens
        place, text = self.fork
        other = write_text(text, count, vocab_size=vocab_size)
        if other[place] == tokens[place]:
            other[place] = (other[place] + 1) % vocab_size
        return tokens[:place] + other[place:]


def write_text(text: str, count: int, *, vocab_size: int) -> list[int]:
    """The first ``count`` tokens of an endless text, seeded ids among which those at the edges come again and again."""
    rng = random.Random(f"{text}/{vocab_size}")
    tokens = [rng.randrange(vocab_size) for _ in range(count)]
    edges = edge_ids(vocab_size)
    for place in range(EDGES // 2, count, EDGES):
        tokens[place] = vocab_size - 1
    for number, place in enumerate(range(EDGES - 1, count, EDGES)):
        tokens[place] = edges[number % len(edges)]
    return tokens


def edge_ids(vocab_size: int) -> list[int]:
    """Ids next to where two or four ranks part the vocabulary, as it is or padded to 64s, and the first id.

    >>> edge_ids(499)
    [249, 0, 127, 128, 255, 256, 383, 384]
    """
    padded = -(-vocab_size // PADDING) * PADDING
    cuts = sorted({padded * part // ranks for ranks in SHARDS for part in range(1, ranks)})
    found = [vocab_size // 2, 0, *(cut + side for cut in cuts for side in (-1, 0))]
    return [n for n in dict.fromkeys(found) if 0 <= n < vocab_size]


RECIPES: dict[str, Recipe] = {
    "one": Recipe(1),
    "short": Recipe(7),
    "long-40": Recipe(40),
    "long-200": Recipe(200),
    "ragged-1": Recipe(1),
    "ragged-13": Recipe(13),
    "ragged-33": Recipe(33),
}
SETS: dict[str, tuple[str, ...]] = {
    "smoke": ("short", "long-40", "long-200"),
    "ragged-batch": ("ragged-1", "ragged-13", "ragged-33"),
    "text": tuple(PASSAGES),
}
"""Names for several cases that are submitted as one batch."""


def find_recipe(name: str) -> Recipe | None:
    """The recipe of a built-in case, or of a sized one: ``len-17``, ``len-17+4`` (new tokens), ``len-17+4@b`` (text).

    ``len-17+4f``: the new tokens are fed, not chosen. ``@a16b``: text ``a``, from position 16 on text ``b``. ``:2`` at
    the end: the same once more, under an id of its own.

    >>> find_recipe("len-17+4f@a16b:2")
    Recipe(length=17, new_tokens=4, batch=0, text='@a', fork=(16, '@b'), forced=True)
    """
    found = SIZED.fullmatch(name)
    if found is None or not int(found[1]):
        return RECIPES.get(name)
    length, new, forced, before, place, after, text = found.groups()
    fork = (int(place), f"@{after}") if place else None
    return Recipe(int(length), int(new or 0), text=f"@{before or text or 'a'}", fork=fork, forced=bool(forced))


class CaseSet:
    """Named cases, not yet tied to a model. ``resolve`` gives the cases; as a decorator it parametrises a test.

    ``CaseSet`` is what ``pk.cases(...)`` returns::

        @pk.cases("short", "long-40")
        def test_modules(parity, case):
            parity.check("modules", case)
    """

    def __init__(self, names: Iterable[str], fixed: Iterable[Case | Written] = ()) -> None:
        self.names = tuple(names)
        self.fixed = tuple(fixed)
        for name in self.names:
            if find_recipe(name) is None and name not in SETS and name not in PASSAGES:
                raise UnknownNameError("case", name, [*RECIPES, *PASSAGES, *SETS, "len-LENGTH+NEW"])

    def ids(self) -> list[str]:
        """The case ids, known before any model is."""
        return list(dict.fromkeys([*self._singles(), *(c.id for c in self.fixed)]))

    def resolve(
        self, *, vocab_size: int, max_positions: int | None = None, tokenizer: Tokenizer | None = None
    ) -> list[Case]:
        """The cases for a model, checked against its vocabulary and length; built-in ones are cut to fit it.

        Raises UsageError for an id outside the vocabulary, a prompt longer than ``max_positions``, a repeated id, or
        text where there is no ``tokenizer``.
        """
        limits = {"vocab_size": vocab_size, "max_positions": max_positions}
        drawn = [_draw(name, tokenizer=tokenizer, **limits) for name in self._singles()]  # type: ignore[arg-type]
        fixed = [case if isinstance(case, Case) else case.read(tokenizer) for case in self.fixed]
        return validate([*drawn, *fixed], vocab_size=vocab_size, max_positions=max_positions)

    def __call__(self, test: Callable[..., Any]) -> Any:
        """Parametrise ``test`` over ``case``: one pytest item for each case id."""
        import pytest

        return pytest.mark.parametrize("case", self.ids())(pytest.mark.parity_cases(self)(test))

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    def _singles(self) -> list[str]:
        return list(dict.fromkeys(single for name in self.names for single in SETS.get(name, (name,))))


def _draw(name: str, *, vocab_size: int, max_positions: int | None, tokenizer: Tokenizer | None) -> Case:
    """A built-in case for a model. Raises UsageError."""
    recipe = find_recipe(name)
    if recipe is not None:
        return recipe.draw(name, vocab_size=vocab_size, max_positions=max_positions)
    passage = PASSAGES[name]
    if tokenizer is None:
        raise UsageError(f"case {name!r} is text, and this model has no tokenizer; take a case like 'smoke' instead")
    most = None if max_positions is None else max(1, max_positions - passage.new_tokens)
    return Written(id=name, passage=passage, new_tokens=passage.new_tokens).read(tokenizer, max_tokens=most)


def cases(*names: str, file: str | os.PathLike[str] | None = None) -> CaseSet:
    """The named cases or sets (default: ``smoke``), and those of a cases file. UnknownNameError on a miss."""
    fixed = read_cases(file) if file is not None else []
    return CaseSet(names or (() if fixed else ("smoke",)), fixed)


def validate(found: list[Case], *, vocab_size: int, max_positions: int | None = None) -> list[Case]:
    """``found``, after checking ids, token ranges and lengths. Raises UsageError naming the case."""
    seen: set[str] = set()
    for case in found:
        if case.id in seen:
            raise UsageError(f"case id {case.id!r} is used twice")
        seen.add(case.id)
        if not case.tokens:
            raise UsageError(f"case {case.id!r} has no tokens")
        bad = next((t for t in (*case.tokens, *case.forced) if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise UsageError(f"case {case.id!r}: token id {bad} is outside the vocabulary (0 to {vocab_size - 1})")
        if max_positions is not None and len(case.tokens) + case.new_tokens > max_positions:
            raise UsageError(
                f"case {case.id!r}: {len(case.tokens)} tokens and {case.new_tokens} new ones are more than "
                f"the model's {max_positions} positions"
            )
    return found


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    tokens: list[int] | None = None
    text: str | None = None
    messages: list[Message] | None = None
    new_tokens: int = 0
    batch: int = 0
    forced: list[int] = []


def read_cases(path: str | os.PathLike[str]) -> list[Case | Written]:
    """Cases from a JSONL file, one a line: ``"tokens"``, or ``"text"`` or ``"messages"`` for a tokenizer.

    Raises UsageError with the line number.
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read cases from {source}: {error}") from error
    found = [_parse(f"{source}, line {n}", text) for n, text in enumerate(lines, 1) if text.strip()]
    if not found:
        raise UsageError(f"{source} has no cases")
    return found


def _parse(where: str, text: str) -> Case | Written:
    try:
        line = msgspec.json.decode(text, type=_Line)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{where}: {error}") from error
    given = {n: v for n in ("tokens", "text", "messages") if (v := getattr(line, n)) is not None}
    if len(given) > 1:
        names = " and ".join(f'"{name}"' for name in given)
        raise UsageError(f"{where}: {names} say the same; give one of them")
    if not any(given.values()):
        raise UsageError(f'{where}: no "tokens"' + "".join(f', and "{name}" is empty' for name in given))
    if line.new_tokens < 0 or len(line.forced) > line.new_tokens:
        raise UsageError(f'{where}: "new_tokens" must be at least the number of "forced" ids, and not negative')
    rest: dict[str, Any] = {"new_tokens": line.new_tokens, "batch": line.batch, "forced": tuple(line.forced)}
    if line.tokens:
        return Case(id=line.id, tokens=tuple(line.tokens), **rest)
    passage = Passage(text=line.text or "", messages=tuple(line.messages or ()))
    return Written(id=line.id, passage=passage, where=where, **rest)
