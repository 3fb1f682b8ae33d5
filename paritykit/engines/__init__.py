"""Engines: what can run a model and be captured. Importing this package imports no engine."""

from __future__ import annotations

from typing import Any

from paritykit.errors import UsageError
from paritykit.registry import Registry

ENGINES: Registry[Any] = Registry("engine")
ENGINES.register("hf", "paritykit.engines.hf:HFEngine")
ENGINES.register("vllm", "paritykit.engines.vllm.engine:VllmEngine")
ENGINES.register("nano", "paritykit.engines.nano.engine:NanoEngine")
ENGINES.register("module", "paritykit.engines.module:ModuleEngine")


def check_engine(name: str) -> str:
    """``name`` if it is a registered engine or of the form ``package.module:factory``; UnknownNameError otherwise."""
    if ":" not in name and name not in ENGINES.names():
        ENGINES.get(name)
    return name


def engine(name: str, /, model: Any = None, *, isolated: bool | None = None, **arguments: Any) -> Any:
    """An engine that is not open yet.

    ``name`` is registered (``hf``, ``vllm``, ``module``) or a factory, ``package.module:factory``, called with
    ``model`` and ``arguments``. Engines run in a process of their own unless they hold live objects (``module``) or
    ``isolated=False``. Raises UnknownNameError or UsageError.
    """
    check_engine(name)
    if isolated is None:
        isolated = name != "module"
    if not isolated:
        return build_engine(name, model, arguments)
    if not isinstance(model, str) and not hasattr(model, "__fspath__"):
        raise UsageError(f"engine {name!r} runs in its own process and needs a folder or hub id, not {type(model)}")
    from paritykit.engines.process import ProcessEngine

    return ProcessEngine(name, str(model), arguments)


def build_engine(name: str, model: Any, arguments: dict[str, Any]) -> Any:
    """The engine itself, in this process. Raises UsageError for arguments it does not take, or what is no engine."""
    from paritykit.registry import load_attribute

    factory = load_attribute(name, kind="engine factory") if ":" in name else ENGINES.get(name)
    try:
        made = factory(model, **arguments)
    except TypeError as error:
        if "argument" in str(error):
            hint = "; a factory is called with the model's folder, dtype and every engine argument"
            raise UsageError(f"engine {name!r}: {error}{hint if ':' in name else ''}") from error
        raise
    if not all(callable(getattr(made, method, None)) for method in ("open", "describe", "close")):
        raise UsageError(
            f"engine factory {name!r} returned {type(made).__name__}, which is no engine; "
            "for an nn.Module return paritykit.engine('module', model=..., forward=...)"
        )
    return made
