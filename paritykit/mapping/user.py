"""Rules from the user: a TOML file for ``--map``.

::

    [[rule]]
    reference = "model.layers.{i}.self_attn.q_proj"
    candidate = "blocks.{i}.attn.qkv"
    columns = [0, 128]
    [[rule]]
    reference = "model.layers.{i}.mlp.act_fn"
    ignore = "fused into the up projection"

``{name}`` stands for one path component (an index, say) and must be the same on both sides.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import msgspec

from paritykit.captures.manifest import Manifest, Point, leading_points
from paritykit.errors import UsageError
from paritykit.mapping.rules import Block, Ignored, Rule

NAME = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class UserRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[rule]]``: a pattern and what to do with the points it matches. ``where`` is for messages."""

    reference: str
    candidate: str = ""
    columns: tuple[int, int] | None = None
    transpose: bool = False
    plus: str = ""
    ignore: str = ""
    where: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    rule: list[UserRule] = []


def read_rules(path: str | os.PathLike[str]) -> list[UserRule]:
    """The rules of a TOML file. Raises UsageError naming the file and the rule that is wrong."""
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
        found = msgspec.convert(tomllib.loads(text), type=_File).rule
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"map file {source}: {error}") from error
    if not found:
        raise UsageError(f"map file {source} has no [[rule]]")
    return [_checked(msgspec.structs.replace(r, where=f"{source}, rule {n}")) for n, r in enumerate(found, 1)]


def _checked(rule: UserRule) -> UserRule:
    if bool(rule.candidate) == bool(rule.ignore):
        raise UsageError(f"{rule.where} ({rule.reference}): give either 'candidate' or 'ignore'")
    if rule.columns is not None and not 0 <= rule.columns[0] < rule.columns[1]:
        raise UsageError(f"{rule.where}: columns must be [first, end] with first < end, not {list(rule.columns)}")
    names = set(NAME.findall(rule.reference))
    for target in (rule.candidate, rule.plus):
        missing = set(NAME.findall(target)) - names
        if missing:
            raise UsageError(f"{rule.where}: {{{missing.pop()}}} in {target!r} is not in the reference pattern")
    return rule


def expand(rules: list[UserRule], reference: Manifest, candidate: Manifest) -> tuple[list[Rule], list[Ignored]]:
    """Concrete rules for the points of two captures; a later rule for the same point replaces an earlier one.

    Raises UsageError for a rule that matches nothing.
    """
    found: dict[str, Rule | Ignored] = {}
    ours, theirs = leading_points(reference.points), leading_points(candidate.points)
    for rule in rules:
        pattern = compile_pattern(rule.reference)
        matches = [(k, m.groupdict()) for k in ours if (m := pattern.fullmatch(k))]
        if not matches:
            raise UsageError(
                f"{rule.where}: no reference point matches {rule.reference!r}{_near(rule.reference, ours)}"
            )
        for key, names in matches:
            ignored = Ignored(reference=key, reason=rule.ignore)
            found[key] = ignored if rule.ignore else _concrete(rule, ours[key], names, theirs)
    concrete = [r for r in found.values() if isinstance(r, Rule)]
    return concrete, [r for r in found.values() if isinstance(r, Ignored)]


def _concrete(rule: UserRule, point: Point, names: dict[str, str], theirs: dict[str, Point]) -> Rule:
    candidate, plus = _fill(rule.candidate, names), _fill(rule.plus, names)
    for target in filter(None, (candidate, plus)):
        if target not in theirs:
            raise UsageError(f"{rule.where}: the candidate has no point {target!r}{_near(target, theirs)}")
    _check_sizes(rule, point, theirs[candidate], theirs[plus or candidate])
    blocks = () if rule.columns is None else _columns(rule.columns, theirs[candidate].rank)
    return Rule(
        reference=point.key, candidate=candidate, blocks=blocks, transpose=rule.transpose, plus=plus, source=rule.where
    )


def _columns(columns: tuple[int, int], rank: int) -> tuple[Block, ...]:
    return (Block(rank, columns[0], columns[1] - columns[0]),)


def _check_sizes(rule: UserRule, point: Point, candidate: Point, plus: Point) -> None:
    """Raise UsageError where the rule's columns, ``transpose`` or ``plus`` cannot be carried out."""
    width, wanted = math.prod(candidate.row), math.prod(point.row)
    if rule.columns is not None and (rule.columns[1] > width or rule.columns[1] - rule.columns[0] != wanted):
        raise UsageError(
            f"{rule.where}: columns {list(rule.columns)} of {candidate.key!r}, which has {width}, "
            f"are not the {wanted} features of {point.key!r}"
        )
    if rule.transpose and len(candidate.row) < 2:
        raise UsageError(f"{rule.where}: a row of {candidate.key!r} has one axis only; there is nothing to transpose")
    if plus.row != candidate.row:
        raise UsageError(f"{rule.where}: {plus.key!r} has rows {plus.row}, and {candidate.key!r} has {candidate.row}")


def compile_pattern(text: str) -> re.Pattern[str]:
    """The regular expression of a pattern: ``{name}`` is one path component.

    >>> bool(compile_pattern("model.layers.{i}.mlp").fullmatch("model.layers.12.mlp"))
    True
    """
    parts = NAME.split(text)
    seen: set[str] = set()
    expression = ""
    for number, part in enumerate(parts):
        if number % 2 == 0:
            expression += re.escape(part)
        else:
            expression += f"(?P={part})" if part in seen else f"(?P<{part}>[^.#@]+)"
            seen.add(part)
    return re.compile(expression)


def _fill(text: str, names: dict[str, str]) -> str:
    return NAME.sub(lambda m: names[m.group(1)], text)


def _near(name: str, known: Iterable[str]) -> str:
    plain = NAME.sub("0", name)
    near = get_close_matches(plain, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
