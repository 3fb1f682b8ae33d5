"""What a watched KV cache told, as findings: slots that no request owned were written, or its own were not."""

from __future__ import annotations

import msgspec

from paritykit.diagnose.locate import Graph
from paritykit.engines.strays import Stray, Watched
from paritykit.invariance.compare import View
from paritykit.results import Finding, Unmatched

PORT = "cache"
FIRST = "key_cache"
SOURCE = "every slot is written with its position, and no other"


def stray_findings(view: View, graph: Graph, *, check: str, condition: str) -> list[Finding]:
    """One finding for each watched layer and case: how many slots were wrong in steps with that case.

    What came after the last step is told of every case. Empty where the engine watched nothing.
    """
    seen = _watched(view)
    if seen is None:
        return []
    found = []
    for layer in seen.layers:
        name = _reference_name(view, layer)
        for number, case in enumerate(view.capture.manifest.cases):
            strays = [s for s in seen.strays if s.layer == layer and (not s.cases or number in s.cases)]
            finding = Finding(
                check=check,
                case=case.id,
                point=f"{name}#{PORT}",
                verdict="fail" if strays else "pass",
                metric="stray_slots",
                value=float(sum(s.slots for s in strays)),
                allowed=0.0,
                allowed_source=SOURCE,
                order=graph.order(f"{name}#{FIRST}"),
                message=f"{condition}: {_told(view, strays)}" if strays else condition,
                condition=condition,
                candidate_point=layer,
                mapping="every block of the cache, after every step",
            )
            found.append(_blamed(finding, name) if strays else finding)
    return found


def unwatched(view: View) -> list[Unmatched]:
    """The layers whose cache the engine could not watch, with the reason."""
    seen = _watched(view)
    reasons = {} if seen is None else seen.unwatched
    return [
        Unmatched(side="candidate", point=f"{_reference_name(view, n)}#{PORT}", reason=r) for n, r in reasons.items()
    ]


def _watched(view: View) -> Watched | None:
    told = view.capture.manifest.facts.get("cache")
    return None if told is None else msgspec.convert(told, Watched)


def _reference_name(view: View, layer: str) -> str:
    """The reference's name of a layer, by the rule for its keys; its own where there is none."""
    rules = (r for r in view.rules.values() if r.candidate == f"{layer}#{FIRST}")
    return next((r.reference.partition("#")[0] for r in rules), layer)


def _blamed(finding: Finding, name: str) -> Finding:
    return msgspec.structs.replace(finding, origin="introduced", located=name)


def _told(view: View, strays: list[Stray]) -> str:
    """The first in words, and how many more there are."""
    more = f"; {len(strays) - 1} more times" if len(strays) > 1 else ""
    return f"{_sentence(view, strays[0])}{more}"


def _sentence(view: View, stray: Stray) -> str:
    ids = [c.id for c in view.capture.manifest.cases]
    ranks = f" on rank {stray.rank}" if sum(view.capture.manifest.side.parallel.values()) > 2 else ""
    place = f"block {stray.block}" + (f", offset {stray.offset}" if stray.offset >= 0 else "")
    part = f"{stray.part} of " if stray.part else ""
    owner = f"a block of {ids[stray.owner]}" if stray.owner >= 0 else "a block of no request"
    when = f"step {stray.step} ({', '.join(ids[c] for c in stray.cases)})" if stray.cases else "after the last step"
    shared = f" (or one of {', '.join(stray.beside)}: they share memory)" if stray.beside else ""
    many = f" and {stray.slots - 1} more slots" if stray.slots > 1 else ""
    if stray.kind == "shared":
        return f"{place}{ranks} is written to while it is in the table of {ids[stray.owner]} as well, in {when}"
    if stray.kind == "lost":
        return f"{part}{place}{many}{ranks} was not written, though a position of {when} belongs there"
    return f"{part}{place}{many}{ranks}, {owner}, was written{shared}, though no position of {when} belongs there"
