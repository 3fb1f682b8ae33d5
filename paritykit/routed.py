"""Points behind an expert flip, judged again: the candidate runs once more with the reference's routing put in.

Each router's own logits are recorded, and what goes on are the reference's. So every token goes to the experts that the
reference chose, and what comes behind is held against it as in a dense model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch

from paritykit.captures.manifest import Manifest, Segment
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.captures.writer import CaptureFolder, PartWriter
from paritykit.case import Case
from paritykit.checks import CHECKS
from paritykit.checks.base import Check, Subject
from paritykit.comparison.routing import Rerouted, Router, chosen_experts, find_routers
from paritykit.engines.base import Progress
from paritykit.errors import EngineError, ParityError
from paritykit.mapping.feeding import can_feed, make_feed
from paritykit.replays import with_neighbours
from paritykit.results import Finding

TOLD = "judged with the reference's routing"


class Routed:
    """A subject's candidate with the reference's routing, from further runs of ``engine``, which is open.

    Each case runs once; captures go into ``folder``.
    """

    def __init__(self, subject: Subject, engine: Any, *, folder: Path, progress: Progress | None = None) -> None:
        self._subject, self._engine, self._folder, self._progress = subject, engine, folder, progress
        self._rules = {r.reference: r for r in subject.mapping.rules}
        self._routers = find_routers(subject.reference.manifest)
        self._again: dict[str, Subject | str] = {}
        """By case what the run gave, or why there was none."""
        self._found: dict[tuple[str, str], dict[str, Finding]] = {}

    def settle(self, findings: list[Finding]) -> list[Finding]:
        """``findings`` with a verdict where they were inconclusive behind a flip, if the engine can be run so."""
        if not self.wants(findings):
            return findings
        self._run(dict.fromkeys(f.case for f in findings if self._is_behind(f)))
        return [self._settled(f) if self._is_behind(f) else f for f in findings]

    def wants(self, findings: list[Finding]) -> bool:
        """Whether any of them is inconclusive behind a flip, and the engine can be given other routing."""
        able = "replay" in self._engine.capabilities and all(self._is_fed(r) for r in self._routers)
        return able and any(self._is_behind(f) for f in findings)

    def _is_behind(self, finding: Finding) -> bool:
        flips = self._subject.flips.get(finding.case, Rerouted()).flips
        return finding.verdict == "inconclusive" and any(flip.order < finding.order for flip in flips)

    def _is_fed(self, router: Router) -> bool:
        return router.chosen > 0 and router.key in self._rules and can_feed(self._rules[router.key])

    def _run(self, cases: Iterable[str]) -> None:
        todo = [c for c in cases if c not in self._again]
        if not todo:
            return
        try:
            capture = self._capture(with_neighbours(self._subject.candidate, todo))
        except ParityError as error:
            self._again |= dict.fromkeys(todo, str(error))
        else:
            again = self._subject.again(capture, flips={c: Rerouted() for c in todo})
            self._again |= dict.fromkeys(todo, again)

    def _capture(self, cases: list[Case]) -> Capture:
        """What the candidate gives. Raises EngineError where a router could not be given other logits."""
        if self._progress:
            self._progress("replaying the reference's routing", 0, 0)
        folder = self._folder / f"routing{len(self._again)}"
        routing = self._write_routing(cases, folder)
        rules = [self._rules[r.key] for r in self._routers]
        manifest = self._subject.candidate.manifest
        feed = make_feed(rules, reference=routing.manifest, folder=routing.path, candidate=manifest)
        out = folder.with_name(f"{folder.name}-run")
        found: Capture = self._engine.run(cases, points=Selection(), out=out, progress=self._progress, feed=feed)
        missing = {r.candidate for r in rules} - set(found.manifest.facts["fed"])
        if missing:
            raise EngineError(f"{', '.join(sorted(missing))} cannot be given other logits")
        return found

    def _write_routing(self, cases: list[Case], folder: Path) -> Capture:
        """The reference's router logits as the candidate would have them, without ties."""
        reference, points = self._subject.reference, self._subject.candidate.point
        with CaptureFolder(folder) as made, PartWriter(made.path) as part:
            for number, case in enumerate(cases):
                part.step([Segment(number, 0, case.positions)])
                for router in self._routers:
                    dtype = getattr(torch, points(self._rules[router.key].candidate).dtype)
                    own = reference.point(router.key)
                    logits = part_ways(reference.rows(router.key, case.id), count=router.chosen, dtype=dtype)
                    part.record(
                        logits, module=own.module, port=own.port, call=own.call, kind=own.kind, axes="tokens, features"
                    )
            manifest = Manifest(side=reference.manifest.side, cases=cases)
            return Capture.open(made.commit(manifest, [part.finish()]), verify=False)

    def _settled(self, finding: Finding) -> Finding:
        again = self._again[finding.case]
        if isinstance(again, str):
            return _with(finding, f"{finding.message}; the reference's routing could not be put in: {again}")
        place = (finding.check, finding.case)
        if place not in self._found:
            check = CHECKS.get(finding.check)
            judged = check.run(again, finding.case) if isinstance(check, Check) else []
            self._found[place] = {f.point: f for f in judged}
        new = self._found[place].get(finding.point)
        if new is None or new.verdict == "inconclusive":
            return finding
        return _with(new, "; ".join(filter(None, (new.message, f"{TOLD}: {finding.message}"))))


def part_ways(logits: torch.Tensor, *, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Router logits ``[tokens, experts]`` in ``dtype``, of which the same ``count`` are the largest, without a tie.

    What rounding made equal to the least of these is lowered by one or two steps, or a fourth of that of 1.
    """
    found, chosen = logits.to(dtype), chosen_experts(logits.double(), count)
    least = found.masked_fill(~chosen, torch.inf).amin(1, keepdim=True)
    lower = least - least.abs().clamp(min=0.25) * torch.finfo(dtype).eps
    return torch.where(~chosen & (found >= least), lower, found)


def _with(finding: Finding, message: str) -> Finding:
    return msgspec.structs.replace(finding, message=message)
