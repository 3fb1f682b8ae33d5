"""A request: its tokens so far and how many of them are in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from paritykit.engines.nano.sampling import GREEDY, Sampling


@dataclass(kw_only=True)
class Request:
    """One request.

    ``tokens`` are the prompt and what was fed after it; ``chosen`` what the model chose, which differs where ``forced``
    tokens are fed instead. ``computed`` of the tokens have been computed, and the first ``cached`` were found in the
    cache. ``label`` is the case, -1 for none: cases are recorded, so they also compute what was found, reading it but
    not writing it again. Requests of different ``salt`` share no blocks, whatever their tokens.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    forced: tuple[int, ...] = ()
    stop: frozenset[int] = frozenset()
    label: int = -1
    salt: int = 0
    tokens: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.prompt)

    @property
    def positions(self) -> int:
        """Positions it computes at most: the last new token is never fed back."""
        return len(self.prompt) + max(self.max_tokens - 1, 0)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to compute."""
        if self.computed < len(self.prompt):
            return False
        return len(self.chosen) >= self.max_tokens or (bool(self.chosen) and self.chosen[-1] in self.stop)

    def accept(self, token: int) -> None:
        """Take the model's choice, and feed it or what is forced in its place."""
        number = len(self.chosen)
        self.chosen.append(token)
        if not self.finished:
            self.tokens.append(self.forced[number] if number < len(self.forced) else token)
