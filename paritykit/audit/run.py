"""One audit, from the folder a user names to the sorted notices."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from paritykit.audit.notice import SEVERITIES, Audit, Notice
from paritykit.engines.checkpoint import find_folder
from paritykit.errors import EngineMissingError, UsageError


def audit(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    tensor_parallel_size: int = 1,
    deep: bool = True,
    progress: Callable[[str, int, int], object] | None = None,
) -> Audit:
    """Every notice on the checkpoint in ``folder`` (or of that hub id), the worst first. Runs no model.

    ``base`` is the checkpoint that this one may be a delta to; ``tensor_parallel_size`` the split it should stand.
    ``deep=False`` reads headers only. Raises UsageError if a folder is no checkpoint at all, EngineMissingError
    without transformers.
    """
    if tensor_parallel_size < 1:
        raise UsageError(f"tensor_parallel_size must be at least 1, not {tensor_parallel_size}")
    started = time.perf_counter()
    _need_transformers()
    from paritykit.audit.delta import against_base
    from paritykit.audit.folder import Folder
    from paritykit.audit.rules import RULES

    facts = Folder(find_folder(str(folder)), deep=deep, tensor_parallel_size=tensor_parallel_size, progress=progress)
    other = None if base is None else Folder(find_folder(str(base)), deep=False)
    try:
        notices = [notice for rule in RULES for notice in rule(facts)]
        notices.extend(against_base(facts, other) if other else ())
    except OSError as error:
        raise UsageError(f"{facts.path} changed or could not be read: {error}") from error
    return Audit(
        notices=_sorted(notices),
        files=list(facts.files),
        tensors=sum(len(f.tensors) for f in facts.files.values()),
        bytes=sum(f.size for f in facts.files.values()),
        deep=deep,
        seconds=time.perf_counter() - started,
    )


def _sorted(notices: list[Notice]) -> list[Notice]:
    """The worst first, otherwise in the order of the rules."""
    return sorted(dict.fromkeys(notices), key=lambda n: SEVERITIES.index(n.severity))


def _need_transformers() -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is None or find_spec("torch") is None:
        raise EngineMissingError("an audit needs torch and transformers: pip install 'paritykit[hf]'")
