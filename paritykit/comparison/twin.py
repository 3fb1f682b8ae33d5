"""The twin's error against the truth at one point: the noise floor as a single number."""

from __future__ import annotations

from paritykit.captures.reader import Capture
from paritykit.comparison.align import own_rows
from paritykit.comparison.metrics import Meter


def twin_error(truth: Capture, twin: Capture, key: str, case: str) -> float | None:
    """The twin's ``rel_l2`` at a point of a case; None where one of both does not show all of it."""
    meter, fed = Meter(), False
    for span in truth.spans(truth.point(key), case):
        ours, theirs = (own_rows(c, key, case, span.position, span.length) for c in (truth, twin))
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return None
        meter.update(ours, theirs)
        fed = fed or bool(ours.numel())
    return meter.result().rel_l2 if fed else None
