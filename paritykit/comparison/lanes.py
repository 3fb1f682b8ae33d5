"""Work on several cores without torch's own threads.

Torch splits every operation over its threads and waits for all of them each time. On tile-sized operations of a busy
machine that wait costs many times the work (30 x was seen), so each lane runs its operations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def run_lanes(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each of ``works`` returns, in order; each runs in a thread of its own, a single one in the caller's."""
    with _torch_threads_kept():
        if len(works) == 1:
            return [_alone(works[0])]
        with ThreadPoolExecutor(len(works)) as pool:
            return list(pool.map(_alone, works))


def _alone(work: Callable[[], T]) -> T:
    torch.set_num_threads(1)  # of this thread, and the default of threads that begin later
    return work()


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
