"""Causes that a check names by itself: what is wrong with weights or files needs no test. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import msgspec

from paritykit.diagnose.catalogue import CAUSES
from paritykit.results import Cause, Finding

PLAIN = {
    "unread": "weight-not-loaded",
    "unwritten": "weight-not-loaded",
    "constant": "weight-not-loaded",
    "wrong-order": "rows-permuted",
    "wrong-transpose": "weight-corrupt",
    "written-twice": "weight-shared-wrongly",
    "tied-wrongly": "weight-shared-wrongly",
    "untied-wrongly": "lm-head",
    "changed": "weight-corrupt",
    "offset": "norm-offset",
    "scale": "scale-factor",
    "value-changed": "weight-corrupt",
    "dtype-narrowed": "dtype-rounding",
    "missing-tensor": "weight-not-loaded",
    "key-in-two-files": "weight-corrupt",
    "nonfinite": "weight-corrupt",
    "all-zero": "weight-not-loaded",
    "digest-mismatch": "weight-corrupt",
    "truncated-file": "weight-corrupt",
    "tie-mismatch": "weight-shared-wrongly",
}
"""A problem of the ledger or the audit, and the cause that it is."""
ON_RANKS = re.compile(r"\branks?\b")
GATE_OR_UP = re.compile(r"\.(gate_proj|up_proj|gate_up_proj|w1|w3|fc1|fc2)\.")
EXPERT = re.compile(r"\.experts?\.")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")
VOCABULARY = re.compile(r"(^|\.)(lm_head|embed_out|embed_tokens|embed_in|word_embeddings|wte)\.")
OTHER_ROWS = re.compile(r"stored as \[(\d+), ([\d, ]+)\].* makes it \[(?!\1,)\d+, \2\]")
"""How the audit says that a tensor has more rows or fewer than it should, and is otherwise of its size."""
HISTORY = ("prefix_cache", "repeat")
"""Checks whose two runs differ in what was computed before a request, and in nothing else."""
LIKELY = 0.7
ALL = 1.0
FEW = 0.01
"""Share of a tensor below which what did not arrive is damage, and not a tensor that was not loaded."""


def named(findings: Iterable[Finding]) -> list[Finding]:
    """``findings`` of the checks of weights and files with the cause that each failure is; others as they are.

    Where a request differs only for what came before it, and no check of anything else fails, it is what that left.
    """
    known = list(findings)
    if all(f.check in HISTORY for f in known if f.verdict == "fail"):
        return [_left_over(f) if f.verdict == "fail" and f.origin != "inherited" else f for f in known]
    tied = any(f.metric == "tied-wrongly" for f in known)
    looked = ("weights", "checkpoint")
    return [_named(f, tied=tied) if f.verdict == "fail" and f.check in looked else f for f in known]


def weights_of(findings: Iterable[Finding], module: str, parameters: Mapping[str, str]) -> list[Cause]:
    """The causes that check ``weights`` names for a module's own tensors.

    ``parameters``: tensor to the reference's parameter.
    """
    found = []
    for finding in findings:
        parameter = parameters.get(finding.point, finding.point)
        inside = parameter.rpartition(".")[0] == module
        if finding.check == "weights" and finding.verdict == "fail" and inside and finding.causes:
            found.append(finding.causes[0])
    return found


def _named(finding: Finding, *, tied: bool) -> Finding:
    name = cause_of(finding, tied=tied)
    if not name:
        return finding
    kind = CAUSES.get(name)
    said = Cause(code=kind.code, name=name, confidence=ALL, evidence=f"check {finding.check}: {finding.message}")
    return msgspec.structs.replace(finding, causes=[said])


def _left_over(finding: Finding) -> Finding:
    kind = CAUSES.get("kv-stale")
    text = f"check {finding.check}: {finding.condition or 'after others'} the request gives other numbers than alone, "
    text += "and nothing else that was checked fails: it takes keys that others left"
    said = Cause(code=kind.code, name=kind.name, confidence=LIKELY, evidence=text)
    return msgspec.structs.replace(finding, causes=[said])


def cause_of(finding: Finding, *, tied: bool = False) -> str:
    """The cause that a failing finding of check ``weights`` or ``checkpoint`` is; empty for none in particular.

    ``tied``: head and embedding were found to share a weight that they should not.
    """
    code, tensor = finding.metric, finding.point
    if code in ("wrong-slice", "wrong-order"):
        cut = ON_RANKS.search(finding.message) or _cut_apart(finding)
        return "tp-shard" if cut else _misplaced(code, tensor, finding.message)
    if code in ("unread", "missing-tensor") or _absent(finding):
        return _missing(finding, tied=tied)
    if code == "shape-mismatch":
        return "vocab-shard" if VOCABULARY.search(tensor) and OTHER_ROWS.search(finding.message) else ""
    if code == "offset" and "norm" not in tensor and "ln_" not in tensor:
        return "weight-corrupt"
    return PLAIN.get(code, "")


def _absent(finding: Finding) -> bool:
    """Whether the audit says of a head or an embedding that is not tied that it is not there."""
    return finding.metric == "tie-mismatch" and f" no {finding.point}" in finding.message


def _missing(finding: Finding, *, tied: bool) -> str:
    """What it is that a tensor, or part of it, did not arrive."""
    if _few(finding):
        return "weight-corrupt"
    if finding.point.endswith(".bias"):
        return "bias-missing"
    if HEAD.search(finding.point):
        return "weight-shared-wrongly" if tied else "lm-head"
    return "weight-not-loaded"


def _few(finding: Finding) -> bool:
    """Whether it is about a small part of a tensor only."""
    return bool(finding.shape) and 0 < finding.metrics.get("unread", 0) < FEW * math.prod(finding.shape)  # type: ignore[operator]


def _cut_apart(finding: Finding) -> bool:
    """Whether parts of a fused weight lie in several of its parts, on several ranks."""
    return "several" in finding.message and bool(ON_RANKS.search(finding.mapping))


def _misplaced(code: str, tensor: str, text: str) -> str:
    """A weight in another's place: which of them it is about."""
    if EXPERT.search(tensor):
        return "moe-routing"
    if GATE_OR_UP.search(tensor):
        return "gate-up-swapped"
    declared = "declared" in text or "named like" in text or "order" in code
    return "rows-permuted" if declared else "weight-shared-wrongly"
