"""How near the point that was named is to the one where the fault is."""

from __future__ import annotations

from collections.abc import Collection

from paritykit.captures.manifest import Manifest, leading_points
from paritykit.diagnose.locate import Graph
from paritykit.results import Divergence


def shown(wanted: str, seen: Collection[str]) -> str:
    """The point itself where the engine shows it (is among ``seen``), otherwise the nearest module around that it does.

    >>> shown("model.layers.1.mlp.act_fn", {"model.layers.1.mlp", "model.layers.1"})
    'model.layers.1.mlp'
    """
    around = wanted
    while around and around not in seen and not around.startswith("#"):
        around = around.rpartition(".")[0]
    return around or wanted


def named(first: Divergence | None, wanted: str) -> str:
    """The place that a run names first: its module, or the point that shows it where ``wanted`` is no module's."""
    if first is None:
        return ""
    return first.seen_at if wanted.startswith("#") else first.point


def is_near(found: str, wanted: str, manifest: Manifest) -> bool:
    """Whether two modules are the same, one right inside the other, or next to each other in order of execution."""
    if found == wanted:
        return True
    graph = Graph(manifest)
    if graph.around(wanted) == found or graph.around(found) == wanted:
        return True
    modules = list(dict.fromkeys(p.module for p in leading_points(manifest.points).values() if not p.port))
    return found in modules and wanted in modules and abs(modules.index(found) - modules.index(wanted)) == 1
