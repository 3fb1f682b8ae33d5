"""What a parent and an engine's process say to each other: msgpack over a pipe, never pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from paritykit.captures.feed import Feed
from paritykit.case import Case
from paritykit.comparison.ensemble import DrawPlan
from paritykit.results import Side


class Open(msgspec.Struct, tag=True):
    """Build and open an engine."""

    engine: str
    model: str
    arguments: dict[str, Any]


class RunCases(msgspec.Struct, tag=True):
    """Run cases, recording points (None: all) into folder ``out``; with ``feed``, fed so."""

    cases: list[Case]
    points: list[str] | None
    out: str
    feed: Feed | None = None


class DrawRounding(msgspec.Struct, tag=True):
    """Run copies of cases with their rounding drawn anew, and measure them against the capture ``truth``.

    The ensemble goes into folder ``out``.
    """

    cases: list[Case]
    truth: str
    out: str
    plan: DrawPlan


class ReadLedger(msgspec.Struct, tag=True):
    """Write the ledger of every rank into file ``out``, as JSON."""

    out: str


class PoisonCache(msgspec.Struct, tag=True):
    """Fill the KV cache with ``value``."""

    value: float


class CallFunction(msgspec.Struct, tag=True):
    """Call ``package.module:function`` with every worker of the engine, or with ``host`` with the engine itself."""

    target: str
    arguments: dict[str, Any]
    host: bool = False


class Compute(msgspec.Struct, tag=True):
    """Call ``package.module:function``, of no engine, and write what it gives into file ``out``, as JSON."""

    target: str
    arguments: dict[str, Any]
    out: str


class Close(msgspec.Struct, tag=True):
    """Close the engine; the process may open another."""


class Done(msgspec.Struct, tag=True):
    """The order was carried out."""

    side: Side | None = None
    capabilities: list[str] = []
    variations: dict[str, list[dict[str, Any]]] = {}


class Working(msgspec.Struct, tag=True):
    """Progress of the order under way."""

    what: str
    done: int
    total: int


class Failed(msgspec.Struct, tag=True):
    """The order failed: the error's class in ``paritykit.errors`` (empty: unforeseen) and its text.

    ``logged``: an error of other code is behind it, whose traceback is in the log.
    """

    error: str
    message: str
    logged: bool = False


Order = Open | RunCases | DrawRounding | ReadLedger | PoisonCache | CallFunction | Compute | Close
Answer = Done | Working | Failed

encode = msgspec.msgpack.encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
