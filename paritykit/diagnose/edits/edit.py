"""One change of a module's code, of what it holds, or of its children. An edit is a context in which that is so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

Enter = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Edit:
    """``label`` completes "with ... the reference gives the candidate's numbers".

    ``where`` is the file and line of the reference that the candidate then does not do, ``code`` that line. ``prior``
    weighs the plainer of two that compute the same.
    """

    label: str
    enter: Enter
    where: str = ""
    code: str = ""
    prior: float = 1.0
