"""What a fault is: its data, and the registry that they are all in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paritykit.engines.nano.config import NanoConfig
from paritykit.errors import UnknownNameError, UsageError
from paritykit.registry import Registry
from paritykit.testing.faults.conditions import PLAIN, When
from paritykit.testing.faults.needs import Need

Stage = Literal["live", "host", "loading", "checkpoint"]
"""What it is planted in: loaded models, the scheduler's process, between files and loader, a copy of the files."""

KINDS = (
    "weights", "checkpoint", "rotary", "norm", "attention", "scale", "activation", "residual", "embedding", "moe",
    "parallel", "cache", "dtype", "null",
)  # fmt: skip
PLANT = "paritykit.testing.faults.planting:plant"
PLANT_LOADING = "paritykit.testing.faults.planting:plant_loading"
PLANT_HOST = "paritykit.testing.faults.planting:plant_host"

FAULTS: Registry[Fault] = Registry("fault")
"""Every fault by name; other packages add theirs through the entry point group ``paritykit.faults``."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One mistake that can be planted on purpose.

    ``what`` says in a sentence what the engineer did wrong, ``seen`` where it happened in public, ``cause`` the name
    under which it is to be diagnosed, ``checks`` who must find it. ``point`` is the reference's point where it first
    shows, with ``{layer}`` for the layer it is planted in; empty where no point shows it. ``graded``: it has a
    strength in (0, 1], 1 being the real mistake. ``needs`` is what the model must have, ``when`` the conditions under
    which it shows, ``engines`` those it can be planted in.
    """

    name: str
    what: str
    kind: str
    cause: str
    point: str
    plant: Callable[[Any], None] = field(repr=False)
    checks: tuple[str, ...]
    seen: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    when: When = PLAIN
    engines: tuple[str, ...] = ("nano", "vllm")
    stage: Stage = "live"
    graded: bool = False

    def layers(self, config: Mapping[str, Any] | NanoConfig) -> list[int]:
        """The layers of a model it can be planted in, from its ``config.json``; empty where it does not fit.

        A fault of no layer in particular fits all or none.
        """
        try:
            model = config if isinstance(config, NanoConfig) else NanoConfig.read(config)
        except UsageError:
            return []
        return [n for n in range(len(model.layers)) if all(need.fits(model, n) for need in self.needs)]

    def at(self, *, layer: int) -> str:
        """The point where it first shows when planted in ``layer``."""
        return self.point.format(layer=layer)

    def arguments(self, *, layer: int = 1, strength: float = 1.0) -> dict[str, Any]:
        """Engine arguments that plant it while the engine opens. Raises UsageError for a fault of files."""
        order = self.order(layer=layer, strength=strength)
        if self.stage == "checkpoint":
            raise UsageError(f"fault {self.name!r} is in a checkpoint's files: write a damaged copy with damage()")
        if self.stage == "loading":
            return {"before_load": PLANT_LOADING, "before_load_args": order}
        if self.stage == "host":
            return {"after_open": PLANT_HOST, "after_open_args": order}
        return {"after_load": PLANT, "after_load_args": order}

    def order(self, *, layer: int = 1, strength: float = 1.0) -> dict[str, Any]:
        """What a planting function is told. Raises UsageError for a strength that it cannot have."""
        if not 0 < strength <= 1:
            raise UsageError(f"the strength of a fault is more than 0 and at most 1, not {strength}")
        if strength != 1 and not self.graded:
            raise UsageError(f"fault {self.name!r} is not graded: it is there or not, strength must be 1")
        return {"fault": self.name, "layer": layer, "strength": strength}

    def damage(self, source: Path | str, target: Path | str, *, layer: int = 1) -> Path:
        """Write a copy of the checkpoint folder ``source`` with this fault as ``target``, and return that.

        Raises UsageError for a fault that is not one of files, or a ``target`` that exists.
        """
        from paritykit.testing.faults.folder import damaged_copy

        if self.stage != "checkpoint":
            raise UsageError(f"fault {self.name!r} is not in a checkpoint's files: see arguments() and planted()")
        return damaged_copy(Path(source), Path(target), self.plant, layer=layer)


def fault(name: str, **data: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register the decorated planting function as the fault ``name``; its docstring says what is wrong."""

    def register(plant: Callable[[Any], None]) -> Callable[[Any], None]:
        what = " ".join((plant.__doc__ or "").split())
        FAULTS.register(name, Fault(name=name, what=what, plant=plant, **data))
        return plant

    return register


def find(name: str) -> Fault:
    """The fault of that name. Raises UnknownNameError with the nearest ones."""
    return FAULTS.get(name)


def for_model(config: Mapping[str, Any], *, engine: str = "nano") -> list[Fault]:
    """The faults that can be planted in a model with this ``config.json``, run by ``engine``.

    Raises UnknownNameError for an engine that no fault is written for.
    """
    known = {e for _, f in FAULTS.items() for e in f.engines}
    if engine not in known:
        raise UnknownNameError("engine with plantable faults", engine, known)
    return [f for _, f in FAULTS.items() if engine in f.engines and f.layers(config)]
