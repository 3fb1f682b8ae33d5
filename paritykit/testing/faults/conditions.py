"""Under which conditions a fault shows, as data: engine arguments, and cases to run. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paritykit.case import Case

BLOCK = 32
"""Block size of the conditions with blocks, and tokens that a letter of a line stands for: vLLM's CPU build takes
multiples of 32 only."""


@dataclass(frozen=True)
class Line:
    """A case: letters are stretches of ``BLOCK`` tokens each, the same letter the same tokens; then ``tail`` more."""

    text: str
    tail: int = 8
    new_tokens: int = 0
    batch: int = 0


@dataclass(frozen=True, kw_only=True)
class When:
    """The conditions: ``words`` for people, ``arguments`` of the engine, ``lines`` to run.

    ``only`` is where it shows: ``decode`` (nothing before the first new token is fed back), ``later`` (nothing in the
    first batch), or empty.
    """

    words: str
    lines: tuple[Line, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    only: str = ""

    @property
    def ranks(self) -> int:
        """How many ranks it takes."""
        return int(self.arguments.get("tensor_parallel_size", 1))

    def cases(self, *, vocab_size: int) -> list[Case]:
        """The lines as cases, with seeded tokens of a vocabulary."""
        return [
            Case(id=f"line-{n}", tokens=_tokens(line, n, vocab_size), new_tokens=line.new_tokens, batch=line.batch)
            for n, line in enumerate(self.lines)
        ]


def _tokens(line: Line, number: int, vocab_size: int) -> tuple[int, ...]:
    stretches = [(letter, BLOCK) for letter in line.text] + [(f"tail-{number}", line.tail)]
    found: list[int] = []
    for seed, length in stretches:
        rng = random.Random(f"{seed}/{vocab_size}")
        found += [rng.randrange(vocab_size) for _ in range(length)]
    return tuple(found)


PAGED = {"block_size": BLOCK}
PLAIN = When(words="always", lines=(Line("a", new_tokens=1), Line("", 5, new_tokens=1)))
DECODE = When(words="decode", lines=(Line("a", 8, new_tokens=4), Line("", 5, new_tokens=3)), only="decode")
LATE_DECODE = When(words="decode, several steps", lines=(Line("a", 8, new_tokens=6),), only="decode")
BEYOND = When(words="sequences longer than the window", lines=(Line("a", 13),))
BEYOND_DECODE = When(words="decode beyond the window", lines=(Line("a", 8, new_tokens=4),), only="decode")
BLOCKS = When(words="more than one block", lines=(Line("ab", 5, new_tokens=2),), arguments=PAGED)
PARTIAL = When(
    words="decode with a last block that is not full",
    lines=(Line("a", 9, new_tokens=4),),
    arguments=PAGED,
    only="decode",
)
NEW_BLOCK = When(
    words="decode that begins a block", lines=(Line("a", 31, new_tokens=4),), arguments=PAGED, only="decode"
)
CHUNKS = When(words="chunked prefill", lines=(Line("ab", 9),), arguments={**PAGED, "max_num_batched_tokens": BLOCK})
BATCH = When(words="a batch of unequal lengths", lines=(Line("a", 9), Line("b", 1), Line("c", 20)), arguments=PAGED)
BATCH_DECODE = When(
    words="decode in a batch", lines=(Line("a", 9, new_tokens=4), Line("", 6, new_tokens=4)), only="decode"
)
REPEATED = When(words="a later request", lines=(Line("a"), Line("b", batch=1)), only="later")
PREFIX = When(
    words="prefix caching, a prefix seen before",
    lines=(Line("ab", 5), Line("ab", 9, batch=1)),
    arguments={**PAGED, "enable_prefix_caching": True},
    only="later",
)
SAME_BLOCK = When(
    words="prefix caching, the same block after another one",
    lines=(Line("ab", 5), Line("cd", 5, batch=1), Line("cb", 9, batch=2)),
    arguments={**PAGED, "enable_prefix_caching": True},
    only="later",
)
PREEMPTED = When(
    words="preemption",
    lines=(Line("a", 28, new_tokens=12), Line("b", 28, new_tokens=12)),
    arguments={**PAGED, "num_blocks": 5},
)
CROWDED = When(
    words="a batch that shares the pool",
    lines=(Line("ab", 9, new_tokens=3), Line("c", 30, new_tokens=8)),
    arguments={**PAGED, "num_blocks": 8},
)
TWO_RANKS = When(words="tensor_parallel_size > 1", lines=(Line("a"),), arguments={"tensor_parallel_size": 2})
TWO_STAGES = When(words="pipeline_parallel_size > 1", lines=(Line("a"),), arguments={"pipeline_parallel_size": 2})
FOUR_RANKS = When(words="more ranks than kv heads", lines=(Line("a"),), arguments={"tensor_parallel_size": 4})
FP8_CACHE = When(words="an fp8 KV cache", lines=(Line("a"),), arguments={"kv_dtype": "fp8"})
