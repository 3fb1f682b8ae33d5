"""The table of rules: each is a function from a folder's facts to notices. A new rule is one function in its tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from paritykit.audit import config, copies, defaults, delta, files, parallel, rope, tensors, tie, values
from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice

Rule = Callable[[Folder], Iterable[Notice]]

RULES: tuple[Rule, ...] = (
    *files.RULES,
    *copies.RULES,
    *tensors.RULES,
    *tie.RULES,
    *values.RULES,
    *delta.RULES,
    *config.RULES,
    *defaults.RULES,
    *rope.RULES,
    *parallel.RULES,
)
