"""The twin's error against the truth at one point, the noise floor; and texts that the twin also reads at once.

Kernels for a single row are more exact than those for many: in float32 torch's product with a vector errs half to two
thirds as much as its product with a matrix. An engine that computes several requests together uses the latter also
where it decodes, so a text that was decoded token by token has too low a floor: clean engines came to 2.1 times it. The
twin therefore reads such a text as one prompt too, which is one more forward pass of few tokens, and the larger of its
errors counts: engines then came to 1.3 times that. In a text whose prompt is most of it, decoding does not show.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.comparison.align import own_rows
from paritykit.comparison.metrics import Meter

AT_ONCE = " at once"


def read_at_once(cases: Iterable[Case]) -> list[Case]:
    """For each case that decodes half of its positions or more, the same positions as one prompt.

    Of those that are forced all the way; others have no text yet.
    """
    return [
        msgspec.structs.replace(c, id=c.id + AT_ONCE, tokens=text, new_tokens=1, forced=())
        for c in cases
        if c.new_tokens > len(c.tokens) and len(text := (c.tokens + c.forced)[: c.positions]) == c.positions
    ]


def twin_cases(twin: Capture, case: str) -> list[str]:
    """The cases of a twin that hold the positions of ``case``: itself, and the same text read at once."""
    return [name for name in (case, case + AT_ONCE) if name in twin.cases]


def twin_error(truth: Capture, twin: Capture, key: str, case: str) -> float | None:
    """The twin's ``rel_l2`` at a point of a case; None where one of both does not show all of it."""
    own, *others = [_error(truth, twin, key, case, name) for name in twin_cases(twin, case)] or [None]
    return None if own is None else max([own, *(e for e in others if e is not None)])


def _error(truth: Capture, twin: Capture, key: str, case: str, name: str) -> float | None:
    meter, fed = Meter(), False
    for span in truth.spans(truth.point(key), case):
        ours = own_rows(truth, key, case, span.position, span.length)
        theirs = own_rows(twin, key, name, span.position, span.length)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return None
        meter.update(ours, theirs)
        fed = fed or bool(ours.numel())
    return meter.result().rel_l2 if fed else None
