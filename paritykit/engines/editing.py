"""The search in the reference's process: its model is loaded, and edited where the candidate differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from paritykit.captures.manifest import split_key
from paritykit.captures.reader import Capture
from paritykit.diagnose.edits.ask import EditFound, Looked, Question
from paritykit.diagnose.edits.rerun import Rerun
from paritykit.diagnose.edits.search import Explained, Search, edits_of
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Bar
from paritykit.engines.hf import HFEngine, quiet
from paritykit.errors import ParityError

Progress = Callable[[str, int, int], None]


def search_edits(
    model: str, arguments: dict[str, Any], question: dict[str, Any], progress: Progress | None = None
) -> list[EditFound]:
    """The best edits at the first of the places where one explains the difference, or else those that come nearest.

    ``model`` and ``arguments`` are the reference's, of engine ``hf``. The best comes first; there is none
    where nothing could be run again.
    """
    asked = msgspec.convert(question, Question)
    sides = (Capture.open(asked.reference, verify=False), Capture.open(asked.candidate, verify=False))
    engine = HFEngine(model, **arguments)
    engine.open()
    try:
        nearest: list[EditFound] = []
        for number, look in enumerate(asked.looks):
            if progress:
                progress("editing the reference's code", number, len(asked.looks))
            found = _at(engine, look, asked, sides)
            if any(f.fits for f in found):
                return found
            nearest = min(nearest, found, key=lambda x: x[0].left if x else 1.0)
        return nearest
    finally:
        engine.close()


def _at(engine: HFEngine, look: Looked, asked: Question, sides: tuple[Capture, Capture]) -> list[EditFound]:
    scene = Scene(
        reference=sides[0],
        candidate=sides[1],
        rules={r.reference: r for r in asked.rules},
        point=look.point,
        located=look.point,
        cases=asked.cases,
        allowed=look.allowed,
        floor=look.floor,
    )
    path = split_key(look.point)[0]
    with torch.no_grad(), engine.computing() as model, quiet():
        module = model.get_submodule(path)
        try:
            rerun = Rerun(model, module, {c: scene.tokens(c).tolist() for c in scene.cases})
        except ParityError:
            return []
        search = Search(rerun, Bar(scene), scene.cases, budget=asked.budget / len(asked.looks))
        if not search.reproduces():
            return []
        best = search.best(edits_of(rerun, module, scene.cases[0]))
    total = sum(e.tried.weight for e in best)
    return [_found(path, e, best, total=total, tried=search.tried) for e in best]


def _found(path: str, explained: Explained, best: list[Explained], *, total: float, tried: int) -> EditFound:
    share = max(1 - explained.left**2, 0.0)
    return EditFound(
        module=path,
        label=explained.edit.label,
        where=explained.edit.where,
        code=explained.edit.code,
        left=explained.left,
        fits=explained.fits,
        confidence=round(share * explained.tried.weight / total, 3) if total else 0.0,
        rival=min((e.left for e in best if e is not explained), default=1.0),
        tried=tried,
    )
