"""The modules of the reference as a tree: which are looked at first, and which are inside another. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from paritykit.captures.manifest import Manifest, leading_points


class Tree:
    """Modules that the reference recorded, each under the nearest one around it.

    What holds the numbered layers, and all around that, is *outer*: it is as long as the model, and never looked at as
    one module.
    """

    def __init__(self, manifest: Manifest) -> None:
        modules = dict.fromkeys(p.module for p in leading_points(manifest.points).values())
        self._inside: dict[str, list[str]] = defaultdict(list)
        for module in modules:
            if module:
                self._inside[_around(module, modules)].append(module)
        self._outer = {""} | {m for m in modules if _holds_layers(m, modules)}

    @property
    def top(self) -> list[str]:
        """The layers and what stands beside them (embedding, last norm, head), and the model as such, ``""``."""
        found = (m for outer in sorted(self._outer) for m in self._inside.get(outer, ()))
        return [*(m for m in found if m not in self._outer), ""]

    def is_outer(self, module: str) -> bool:
        """Whether a module holds the layers, or what holds them."""
        return module in self._outer

    def inside(self, module: str) -> list[str]:
        """The modules directly inside one, in order of execution."""
        return [] if module in self._outer else self._inside.get(module, [])


def _around(module: str, known: Iterable[str]) -> str:
    parent = module.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    return parent


def _holds_layers(module: str, known: Iterable[str]) -> bool:
    """Whether the first number in some longer path comes after ``module``."""
    rests = (k[len(module) + 1 :] for k in known if k.startswith(f"{module}."))
    return not _numbered(module) and any(_numbered(rest) for rest in rests)


def _numbered(path: str) -> bool:
    return any(part.isdecimal() for part in path.split("."))
