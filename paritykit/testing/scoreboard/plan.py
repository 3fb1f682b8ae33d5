"""Which trials there are: every fault, at every strength, in both dtypes, over all models and engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from paritykit.case import Case, cases
from paritykit.engines.nano.config import NanoConfig
from paritykit.errors import UnknownNameError
from paritykit.testing.drawn.named import DRAWN
from paritykit.testing.faults import FAULTS, Fault, find
from paritykit.testing.faults.conditions import PLAIN, When
from paritykit.testing.scoreboard.models import (
    MODELS,
    TRAINED,
    architectures,
    config_of,
    homes,
    runs_in_nano,
    vocabulary_of,
)

ENGINES = ("nano", "vllm")
DTYPES = ("float32", "bfloat16")
LEVELS = {"loud": 0.0, "ten": 10.0, "twice": 2.0}
"""How many times the noise floor a fault's point is to be off by; 0 for a fault as it is."""
CAPTURED = ("modules", "logits", "tokens")
"""Checks that compare two captures."""
BEFORE_RUNNING = ("checkpoint", "weights")
SMOKE = "the smoke cases"
RANKS = (1, 2)
TRAINED_SHARE = 3
"""Of so many faults one is planted in a trained model too."""
ALSO = 2
"""Models beside the first that nano has a fault in."""
MAX_POSITIONS = 512
SHORT = 96
"""What fits into the few blocks of a crowded cache."""
CACHING = "enable_prefix_caching"


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to try: a fault (or one that is none) in a model, or a clean pair under the condition ``when``.

    ``checks`` are those of invariance that a clean pair is held against, in place of the reference.
    """

    kind: Literal["fault", "null", "clean"]
    engine: str
    model: str
    dtype: str
    fault: str = ""
    level: str = "loud"
    when: str = ""
    ranks: int = 1
    checks: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """What tells it from all others."""
        what = self.fault or ", ".join((self.when, *self.checks))
        return f"{self.kind} {self.engine} {self.model} {self.dtype} {self.level} {self.ranks} {what}"

    @property
    def condition(self) -> When | None:
        """The fault's condition, or that of a clean pair; None for the smoke cases."""
        if self.fault:
            return find(self.fault).when
        return None if self.when == SMOKE else conditions()[self.when]

    @property
    def arguments(self) -> dict[str, Any]:
        """The engine's arguments, but for the fault's own."""
        if self.condition is not None:
            return engine_arguments(self.engine, self.condition)
        return {"tensor_parallel_size": self.ranks} if self.ranks > 1 else {}

    def cases(self) -> list[Case]:
        """What is run."""
        if self.condition is None:
            named, vocabulary = ("smoke", "ragged-batch"), vocabulary_of(self.model)
            return cases(*named).resolve(vocab_size=vocabulary, max_positions=MAX_POSITIONS)
        return self.condition.cases(vocab_size=vocabulary_of(self.model))


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which trials are wanted: those that any of the names in each field fits; an empty field is for all of them.

    With ``faults`` clean pairs are left out. Raises UnknownNameError for a name that is not there.
    """

    engines: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        drawn = architectures() if any(name.startswith(DRAWN) for name in self.models) else []
        known = {"engine": ENGINES, "family": [*MODELS, *TRAINED, *drawn], "dtype": DTYPES, "fault": FAULTS.names()}
        asked = (self.engines, self.models, self.dtypes, self.faults)
        for (what, names), wanted in zip(known.items(), asked, strict=True):
            for name in wanted:
                if name not in names:
                    raise UnknownNameError(what, name, names)

    def fits(self, trial: Trial) -> bool:
        """Whether a trial is wanted."""
        return all(
            not wanted or value in wanted
            for wanted, value in (
                (self.engines, trial.engine),
                (self.models, trial.model),
                (self.dtypes, trial.dtype),
                (self.faults, trial.fault),
                (self.kinds, trial.kind),
            )
        )


def conditions(engine: str = "") -> dict[str, When]:
    """The conditions under which faults show, by what they are called; those of one engine's faults."""
    return {f.when.words: f.when for _, f in FAULTS.items() if not engine or engine in f.engines}


def make_plan(*, full: bool = False) -> list[Trial]:
    """All trials: of every fault and model with ``full``, otherwise a share of them that has every fault in it.

    That share: each fault in one model at every strength and in both dtypes, in turn through the models that it fits,
    and in nano as it is and at ten times the floor in two more. A share of them is planted in trained models too.
    """
    found = [t for engine in ENGINES for t in (*_faults(engine, full=full), *_nulls(engine, full=full))]
    found += [t for engine in ENGINES for t in _clean(engine)]
    return list({t.id: t for t in found}.values())


def models_of(engine: str, names: Iterable[str] = MODELS) -> list[str]:
    """Those of the models that an engine runs."""
    return [name for name in names if engine != "nano" or runs_in_nano(name)]


def fitting(fault: Fault, engine: str, models: Iterable[str] = MODELS) -> list[str]:
    """Those of the models that a fault is planted in, in this engine.

    Of a crowded cache vLLM has none with layers of two kinds: each has blocks of its own, and a few do not go round.
    """
    names = list(homes(fault, models))
    if engine == "vllm" and "num_blocks" in fault.when.arguments:
        return [n for n in names if len({layer.window for layer in NanoConfig.read(config_of(n)).layers}) == 1]
    return names


def alone_sees(fault: Fault, engine: str) -> tuple[str, ...]:
    """The checks of invariance that a fault is held against, where no other check that it names would see it.

    So it is with prefix caching in vLLM, which does not compute what it has in its cache, and shows nothing there.
    """
    if engine == "vllm" and CACHING in fault.when.arguments:
        return tuple(c for c in fault.checks if c not in CAPTURED)
    return () if set(fault.checks) & {*CAPTURED, *BEFORE_RUNNING} else fault.checks


def engine_arguments(engine: str, when: When) -> dict[str, Any]:
    """A condition's arguments as the engine calls them: the first block of vLLM's cache is nobody's."""
    found = dict(when.arguments)
    if engine == "vllm" and "num_blocks" in found:
        found |= {"num_gpu_blocks_override": found.pop("num_blocks") + 1, "max_model_len": SHORT}
    return found


def only_audited(fault: Fault) -> bool:
    """Whether a fault of files is looked for before any engine starts."""
    return fault.checks == ("checkpoint",)


def _faults(engine: str, *, full: bool) -> Iterator[Trial]:
    own = [f for _, f in FAULTS.items() if f.kind != "null" and engine in f.engines]
    for number, fault in enumerate(own):
        if only_audited(fault) and engine != "nano":
            continue
        yield from _in_trained(fault, engine, number, full=full)
        names = in_turn(fitting(fault, engine), number)
        more = len(names) if full else ALSO if engine == "nano" and not alone_sees(fault, engine) else 0
        for place, name in enumerate(names[: 1 + more]):
            for level in levels_of(fault, all_of_them=full or not place):
                for dtype in DTYPES[:1] if only_audited(fault) else DTYPES:
                    yield Trial(kind="fault", engine=engine, model=name, dtype=dtype, fault=fault.name, level=level)


def _in_trained(fault: Fault, engine: str, number: int, *, full: bool) -> Iterator[Trial]:
    """A fault in trained models, in bfloat16: in nano each ``TRAINED_SHARE``-th, in one of them."""
    if (
        only_audited(fault)
        or alone_sees(fault, engine)
        or not (full or (engine == "nano" and not number % TRAINED_SHARE))
    ):
        return
    names = in_turn(fitting(fault, engine, TRAINED), number)
    for name in names if full else names[:1]:
        level = "ten" if fault.graded else "loud"
        yield Trial(kind="fault", engine=engine, model=name, dtype="bfloat16", fault=fault.name, level=level)


def levels_of(fault: Fault, *, all_of_them: bool) -> list[str]:
    """The strengths at which a fault is planted."""
    if not fault.graded:
        return ["loud"]
    return list(LEVELS) if all_of_them else ["loud", "ten"]


def in_turn(names: list[str], number: int) -> list[str]:
    """``names`` beginning with another one for each number."""
    start = number % len(names) if names else 0
    return names[start:] + names[:start]


def _nulls(engine: str, *, full: bool) -> Iterator[Trial]:
    nulls = [f for _, f in FAULTS.items() if f.kind == "null" and engine in f.engines]
    for number, fault in enumerate(nulls):
        names = in_turn(list(homes(fault)), number)
        for name in names if full else names[:ALSO]:
            for dtype in DTYPES:
                yield Trial(kind="null", engine=engine, model=name, dtype=dtype, fault=fault.name)


def _clean(engine: str) -> Iterator[Trial]:
    """Every model on one and on two ranks, two models under each condition, trained and drawn ones on one rank."""
    for dtype in DTYPES:
        for name in (*models_of(engine, TRAINED), *(architectures() if engine == "vllm" else ())):
            yield Trial(kind="clean", engine=engine, model=name, dtype=dtype, when=SMOKE)
        for name in models_of(engine):
            for ranks in RANKS:
                yield Trial(kind="clean", engine=engine, model=name, dtype=dtype, when=SMOKE, ranks=ranks)
            yield Trial(kind="clean", engine=engine, model=name, dtype=dtype, when=PLAIN.words)
        own = [f for _, f in FAULTS.items() if engine in f.engines]
        for number, words in enumerate(conditions(engine)):
            same = [f for f in own if f.when.words == words]
            for checks in sorted({alone_sees(f, engine) for f in same if f.kind != "null"}):
                for name in in_turn(fitting(same[0], engine), number)[: 1 if checks else 2]:
                    yield Trial(kind="clean", engine=engine, model=name, dtype=dtype, when=words, checks=checks)


def order(trials: Iterable[Trial]) -> list[Trial]:
    """Trials of one engine one after the other, so that it is opened once."""
    return sorted(trials, key=lambda t: (t.engine, t.model, t.dtype, str(sorted(t.arguments.items())), t.id))


def share(trials: Sequence[Trial], number: int, count: int) -> list[Trial]:
    """The part ``number`` (from 1) of ``count``, each about as long; what one engine's model needs stays together."""
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.engine, trial.model, trial.dtype), []).append(trial)
    parts: list[list[Trial]] = [[] for _ in range(count)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(parts, key=len).extend(group)
    return order(parts[number - 1])
