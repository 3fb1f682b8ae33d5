"""Where a fault is planted: one rank's part of a loaded model, in words that are the same for every engine.

A planting function gets a site and says what is wrong: ``site.on_rotation(wrong)``, ``site.on_reduce(linear, wrong)``.
``wrong`` is called in the place of the right code, is handed what that had and what it gave, and the site mixes both
by the fault's strength.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from paritykit.engines.nano.attention import Scores
from paritykit.testing.faults.changes import Changes

Wrong = Callable[..., Any]


class NotHere(Exception):  # noqa: N818  (no error: another rank has it)
    """The part of the model to be changed is on another rank."""


@dataclass(frozen=True)
class Rotation:
    """One call of a layer's rotary embedding.

    ``query`` and ``key`` ``[tokens, heads, head_dim]`` before it, ``rotated`` the same after it; of every token its
    ``position``, where its chunk ``start`` was, whether it is ``decode``. ``frequencies`` ``[dim / 2]``;
    ``turn(query, key, positions)`` is the engine's own rotation.
    """

    query: torch.Tensor
    key: torch.Tensor
    rotated: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor
    start: torch.Tensor
    decode: torch.Tensor
    frequencies: torch.Tensor
    turn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Core(Protocol):
    """One call of a layer's attention core, its keys and values written already.

    ``run`` computes it again with other settings: scores, or each request with the block table of the request that
    ``order`` names. ``requests`` gives, for those whose keys and values can be had, the rows of the flat batch,
    queries, keys and values ``[n, heads, head_dim]`` and the position of the first query.
    """

    @property
    def scores(self) -> Scores:
        """The right settings."""
        ...

    @property
    def right(self) -> torch.Tensor:
        """The right output, ``[tokens, heads, head_dim]``."""
        ...

    @property
    def decode(self) -> torch.Tensor:
        """Rows that are decode, bool ``[tokens, 1, 1]``."""
        ...

    @property
    def count(self) -> int:
        """How many requests there are."""
        ...

    def run(self, *, scores: Scores | None = None, order: list[int] | None = None) -> torch.Tensor:
        """``[tokens, heads, head_dim]``."""
        ...

    def requests(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        """See the class."""
        ...


@dataclass(frozen=True)
class Write:
    """One call of a layer's cache: ``slots`` that a step's keys and values go to, all ``[tokens]``; -1 is none.

    ``last`` is each request's last row, ``[requests]``.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    decode: torch.Tensor
    last: torch.Tensor


class Site(ABC):
    """What both engines' sites share. ``worker`` holds the model; ``layer`` and ``strength`` are the fault's."""

    engine: str

    def __init__(self, worker: Any, changes: Changes, *, layer: int, strength: float) -> None:
        self.worker, self.changes, self.layer, self.strength = worker, changes, layer, strength

    def blend(self, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        """The wrong result, as far as the fault's strength goes."""
        return wrong if self.strength == 1 else right + self.strength * (wrong - right)

    @property
    @abstractmethod
    def model(self) -> Any:
        """This rank's model."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank among those that share a layer."""

    @property
    @abstractmethod
    def ranks(self) -> int:
        """How many ranks share a layer."""

    @property
    def block(self) -> Any:
        """The decoder layer. NotHere where another rank has it."""
        try:
            return self.present(self.model.model.layers[self.layer])
        except IndexError as error:
            raise NotHere from error

    @property
    def attention(self) -> Any:
        """Its attention."""
        return self.block.self_attn

    @property
    @abstractmethod
    def sparse(self) -> Any:
        """Its mixture of experts."""

    @property
    def embedding(self) -> Any:
        """The token embedding."""
        return self.present(self.model.model.embed_tokens)

    @property
    def final_norm(self) -> Any:
        """The norm after all layers."""
        return self.present(self.model.model.norm)

    def present(self, part: Any) -> Any:
        """``part``. NotHere where another rank has it."""
        if part is None or type(part).__name__ == "PPMissingLayer":
            raise NotHere
        return part

    @abstractmethod
    def norm_facts(self, norm: Any) -> tuple[torch.Tensor, float]:
        """What a norm multiplies with, ``[size]``, and its epsilon."""

    def on_output(self, module: Any, wrong: Wrong) -> None:
        """``wrong(right, *inputs)`` instead of a module's output."""

        def forward(right_of: Any, *args: Any, **kwargs: Any) -> Any:
            output = right_of(*args, **kwargs)
            right = output[0] if isinstance(output, tuple) else output
            mixed = self.blend(right, wrong(right.clone(), *args, **kwargs))
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        self.changes.wrap(module, "forward", forward)

    @abstractmethod
    def on_norm(self, norm: Any, wrong: Wrong) -> None:
        """``wrong(x)`` instead of a norm of ``x``."""

    @abstractmethod
    def on_rotation(self, wrong: Callable[[Rotation], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """``wrong(rotation)`` gives query and key of this layer."""

    @abstractmethod
    def on_attention(self, wrong: Callable[[Any], torch.Tensor]) -> None:
        """``wrong(core)`` instead of the attention core's output, ``[tokens, heads, head_dim]``."""

    @abstractmethod
    def on_slots(self, wrong: Callable[[Write], torch.Tensor]) -> None:
        """``wrong(write)`` gives the slots that this layer's keys and values go to."""

    @abstractmethod
    def on_padding(self, live: Callable[[Write], torch.Tensor]) -> None:
        """Zeros are written to the slots ``live(write)``, after the step's own keys and values."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Positions in a block of the cache."""

    @abstractmethod
    def spoil_cache(self) -> None:
        """Let this layer's cache hold what no request wrote."""

    @abstractmethod
    def on_residual(self, number: int, wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """``wrong(residual, update)`` instead of the layer's first (0) or second (1) residual sum."""

    @abstractmethod
    def on_layer(self, wrong: Wrong) -> None:
        """``wrong(right, hidden)`` instead of what the whole layer makes of ``hidden``."""

    @abstractmethod
    def on_activation(self, wrong: Wrong) -> None:
        """``wrong(gate)`` instead of the activated gate of the layer's MLP."""

    @abstractmethod
    def on_experts(self, wrong: Wrong) -> None:
        """``wrong(run, x, logits)`` instead of the experts' output; ``run(x, logits)`` routes and computes rightly."""

    @abstractmethod
    def on_reduce(self, linear: Any, wrong: Wrong) -> None:
        """``wrong(partial, reduce)`` instead of the sum of every rank's ``partial``."""

    @abstractmethod
    def on_hand_over(self, wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """``wrong(hidden, residual)`` instead of what goes to the stage whose first layer this is.

        ``hidden`` is the sum of ``residual`` and what the last layer's MLP added. NotHere on every other stage.
        """

    @abstractmethod
    def on_embedding_scale(self, wrong: Callable[[float], float]) -> None:
        """``wrong(factor)`` instead of the factor on the embedding."""

    @abstractmethod
    def on_head(self, wrong: Wrong) -> None:
        """``wrong(right, hidden, product)`` instead of the head's output; ``product(hidden, weight)`` is a head's."""

    @abstractmethod
    def on_logits(self, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """``wrong(raw)`` instead of the finished logits; ``raw`` are those before any softcap."""
