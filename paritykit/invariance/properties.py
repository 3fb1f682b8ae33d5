"""The properties: for each, which runs of one engine must agree. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from paritykit.case import Case
from paritykit.checks.base import LOGITS
from paritykit.invariance.trial import (
    Arguments,
    Bench,
    Property,
    Skipped,
    Trial,
    Twins,
    again,
    alone,
    fed,
    same,
    together,
)

CHUNKS = (7, 1, 16)
DECODED = 48
"""At most so many tokens are decoded one by one: each is a step."""
RUBBISH = "in a cache full of rubbish"
POISON = 3e4
"""Large, and a number in every dtype of a cache: an engine may multiply what it masks by zero."""


def _base(bench: Bench, **arguments: Any) -> Trial:
    """Every case alone, fed what the engine itself chose after it."""
    free = Trial(name="alone", cases=alone(bench.cases), arguments=arguments, points=())
    return msgspec.structs.replace(free, cases=fed(free.cases, bench.continuation(free)), points=None)


def batching(bench: Bench) -> Iterator[Twins | Skipped]:
    """A case alone, in a batch, in another order, twice in a batch, beside a much longer one."""
    base = _base(bench)
    cases = base.cases
    longest = max(cases, key=lambda c: c.positions)
    rest = [c for c in cases if c.id != longest.id]
    doubled = [copy for c in cases for copy in (c, again(c, 2))]
    pairs = [(c.id, copy.id) for c in cases for copy in (c, again(c, 2))]
    found = [
        _twins(base, "in one batch", together(cases)),
        _twins(base, "in one batch, in reverse", together(reversed(cases))),
        _twins(base, "each twice in one batch", together(doubled), pairs=pairs),
        *(_twins(base, f"beside {longest.id}", together([longest, c]), pairs=[(c.id, c.id)]) for c in rest),
    ]
    exact = "batch_invariant" in bench.capabilities
    yield from (msgspec.structs.replace(twins, exact=exact) for twins in found)


def chunking(bench: Bench) -> Iterator[Twins | Skipped]:
    """A prompt prefilled whole, and in chunks."""
    if "chunked_prefill" not in bench.capabilities:
        yield Skipped("chunking", f"engine {bench.engine} cannot prefill in chunks")
        return
    whole = max(len(c.tokens) for c in bench.cases)
    own = int(bench.args.get("max_num_batched_tokens", 0))
    base = _base(bench) if own >= whole else _base(bench, max_num_batched_tokens=max(whole, 2048))
    for size in bench.pick([n for n in CHUNKS if n < whole]):
        arguments = {"max_num_batched_tokens": size, "max_num_seqs": min(size, 8)}
        yield _twins(base, f"in chunks of {size}", base.cases, arguments=arguments)
        yield _twins(base, f"in chunks of {size} shared by a batch", together(base.cases), arguments=arguments)


def prefix_cache(bench: Bench) -> Iterator[Twins | Skipped]:
    """A prompt cold, and after others that begin as it does: up to before, at and after a block's edge, and whole."""
    if "prefix_caching" not in bench.capabilities:
        yield Skipped("prefix_cache", f"engine {bench.engine} has no prefix cache")
        return
    base = _base(bench)
    block = int(bench.args.get("block_size", 16))
    arguments = {"enable_prefix_caching": True}
    for case in base.cases:
        for shared in bench.pick(shared_lengths(len(case.tokens), block), few=2):
            warm = _earlier(case, "warm", case.tokens[:shared] + _other(case.tokens[shared:]))
            name = f"after {shared} of its {len(case.tokens)} tokens"
            yield _twins(base, name, alone([warm, case]), arguments=arguments, partial=True)
        if len(case.tokens) > 2 * block:
            first = _earlier(case, "first", case.tokens[:block])
            second = _earlier(case, "second", _other(case.tokens, count=block))
            name = "after its first block, and its others behind another one"
            yield _twins(base, name, alone([first, second, case]), arguments=arguments, partial=True)


def _earlier(case: Case, mark: str, tokens: tuple[int, ...]) -> Case:
    """A prompt that runs before ``case`` and leaves its blocks in the cache."""
    return Case(id=again(case, mark).id, tokens=tokens)


def shared_lengths(length: int, block: int) -> list[int]:
    """How much of a prompt an earlier one shares: all of it, up to the last and the first block's edge, and around.

    >>> shared_lengths(40, 16)
    [40, 32, 16, 31, 33, 15, 17]
    """
    edges = (length // block * block, block)
    found = [length, *edges, *(edge + step for edge in edges for step in (-1, 1))]
    return list(dict.fromkeys(n for n in found if 0 < n <= length))


def _other(tokens: tuple[int, ...], *, count: int = 1) -> tuple[int, ...]:
    """Tokens of which the first so many are others: all that a later block can see of the one before, in any window."""
    return (*(t - 1 if t else 1 for t in tokens[:count]), *tokens[count:])


def decode_prefill(bench: Bench) -> Iterator[Twins | Skipped]:
    """A text in one prefill, and its last tokens decoded one by one."""
    if "teacher_forcing" not in bench.capabilities:
        yield Skipped("decode_prefill", f"engine {bench.engine} cannot be fed given tokens")
        return
    source = _base(bench)
    texts = [(c, (*c.tokens, *c.forced[: c.new_tokens - 1])) for c in source.cases]
    whole = [Case(id=c.id, tokens=text) for c, text in texts]
    split = []
    for case, text in texts:
        prompt = max(1, len(text) - DECODED)
        rest = len(text) - prompt
        split.append(Case(id=case.id, tokens=text[:prompt], new_tokens=rest + 1 if rest else 0, forced=text[prompt:]))
    base = Trial(name="one prefill", cases=alone(whole))
    yield _twins(base, "token by token", alone(split))
    yield _twins(base, "token by token, in one batch", together(split))


def repeat(bench: Bench) -> Iterator[Twins | Skipped]:
    """Every case three times, others between."""
    base = _base(bench)
    copies = [again(c, 2) for c in base.cases] + [again(c, 3) for c in reversed(base.cases)]
    pairs = [(c.id, again(c, n).id) for n in (2, 3) for c in base.cases]
    yield _twins(base, "a second and a third time", alone([*base.cases, *copies]), pairs=pairs)


def observer(bench: Bench) -> Iterator[Twins | Skipped]:
    """Hooks on every module, on the logits alone, and none."""
    base = Trial(name="recording everything", cases=alone(bench.cases))
    yield _twins(base, "recording logits only", base.cases, points=(LOGITS,))
    yield _twins(base, "recording nothing", base.cases, points=())


def tensor_parallel(bench: Bench) -> Iterator[Twins | Skipped]:
    """One rank against several."""
    yield from _parallel(bench, "tensor_parallel")


def pipeline_parallel(bench: Bench) -> Iterator[Twins | Skipped]:
    """One stage against several."""
    yield from _parallel(bench, "pipeline_parallel")


def _parallel(bench: Bench, kind: str) -> Iterator[Twins | Skipped]:
    if kind not in bench.capabilities:
        yield Skipped(kind, f"engine {bench.engine} has no {kind.replace('_', ' ')}")
        return
    argument = f"{kind}_size"
    base = _base(bench, **{argument: 1})
    own = bench.parallel.get(argument, 1)
    for arguments in [{argument: own}] if own > 1 else bench.variations(kind) or [{argument: 2}]:
        yield msgspec.structs.replace(_twins(base, _told(arguments), base.cases, arguments=arguments), ranks=True)


def kv_cache(bench: Bench) -> Iterator[Twins | Skipped]:
    """Other block sizes, the contiguous layout, and a cache that was full of rubbish, watched where the engine can."""
    base = _base(bench)
    watched = "cache_digest" in bench.capabilities
    for arguments in bench.variations("kv_cache"):
        yield _twins(base, _told(arguments), base.cases, arguments=arguments, poison=POISON if watched else None)
    if "poison" in bench.capabilities:
        yield _twins(base, RUBBISH, together(base.cases), poison=POISON)
    else:
        yield Skipped("poisoned cache", f"engine {bench.engine} does not let its cache be filled")
    if not watched:
        yield Skipped("watched cache", f"engine {bench.engine} does not say which slots of its cache were written")


def _told(arguments: Arguments) -> str:
    return ", ".join(f"{k} {v}" for k, v in arguments.items())


def _twins(
    base: Trial,
    name: str,
    cases: Iterable[Case],
    *,
    arguments: Arguments | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
    partial: bool = False,
    points: tuple[str, ...] | None = None,
    poison: float | None = None,
) -> Twins:
    submitted = tuple(cases)
    own = base.arguments if arguments is None else arguments
    varied = Trial(name=name, cases=submitted, arguments=own, points=points, poison=poison)
    known = {c.id for c in base.cases}
    found = same(c for c in submitted if c.id in known) if pairs is None else tuple(pairs)
    return Twins(base=base, varied=varied, pairs=found, partial=partial)


PROPERTIES: dict[str, Property] = {
    "tensor_parallel": tensor_parallel,
    "pipeline_parallel": pipeline_parallel,
    "kv_cache": kv_cache,
    "batching": batching,
    "chunking": chunking,
    "prefix_cache": prefix_cache,
    "decode_prefill": decode_prefill,
    "repeat": repeat,
    "observer": observer,
}
