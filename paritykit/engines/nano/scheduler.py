"""Who computes what in the next step: first come, first served, within a budget of tokens and of blocks. Torch-free.

Prefill and decode are the same thing here: a request has tokens that are not in the cache yet, many or one. Long
prompts are cut into chunks by the budget. When blocks run out, the request that came last gives up its own and is
computed anew later; the one that came first therefore always gets on.
"""

from __future__ import annotations

from collections import deque

from paritykit.engines.nano.blocks import BlockManager, Copy
from paritykit.engines.nano.request import Request
from paritykit.engines.nano.step import Chunk, Plan

Scheduled = list[tuple[Request, Chunk]]


class Scheduler:
    """Holds the requests that wait and those that run."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._seats, self._budget = max_num_seqs, max_num_batched_tokens

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def find(self, id_: str) -> Request | None:
        """The unfinished request of that id."""
        return next((r for r in (*self.running, *self.waiting) if r.id == id_), None)

    def remove(self, request: Request) -> None:
        """Forget a request and free its blocks, whatever it was doing."""
        self.blocks.release(request.id)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it goes to the front of the queue and is computed anew."""
        self.running.remove(request)
        self.blocks.release(request.id)
        request.computed = request.cached = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def fork(self, parent: Request, child: Request) -> None:
        """Let ``child`` go on where ``parent`` is, sharing its blocks if there is a seat for it."""
        if parent not in self.running or len(self.running) >= self._seats:
            self.add(child)
            return
        self.blocks.share(parent.id, child.id)
        child.computed = parent.computed
        self.running.append(child)

    def plan(self) -> tuple[Scheduled, Plan]:
        """The chunks of the next step, running requests first. Empty if there is nothing to do."""
        scheduled: Scheduled = []
        copies: list[Copy] = []
        preempted = self._advance_running(scheduled, copies)
        if not preempted:
            self._admit_waiting(scheduled, copies)
        return scheduled, Plan([c for _, c in scheduled], copies)

    def _advance_running(self, scheduled: Scheduled, copies: list[Copy]) -> bool:
        """Room for the running requests, in order; whether any had to be preempted for it."""
        preempted, number = False, 0
        while number < len(self.running):
            request = self.running[number]
            length = min(len(request.tokens) - request.computed, self._left(scheduled))
            made = self._reserve(request, length) if length else []
            if made is None:
                preempted = True
                self.preempt(self.running[-1])
                continue
            copies += made
            if length:
                scheduled.append((request, self._chunk(request, length)))
            number += 1
        return preempted

    def _admit_waiting(self, scheduled: Scheduled, copies: list[Copy]) -> None:
        while self.waiting and len(self.running) < self._seats and self._left(scheduled):
            request = self.waiting[0]
            found = self.blocks.admit(request.id, request.tokens, salt=request.salt)
            if request.label >= 0:
                request.cached = found
            else:
                request.computed = min(found, len(request.tokens) - 1)  # the last must run: its logits are wanted
            length = min(len(request.tokens) - request.computed, self._left(scheduled))
            made = self._reserve(request, length)
            if made is None:
                self.blocks.release(request.id)
                request.computed = request.cached = 0
                return
            copies += made
            self.running.append(self.waiting.popleft())
            scheduled.append((request, self._chunk(request, length)))

    def _reserve(self, request: Request, length: int) -> list[Copy] | None:
        """Room for the next ``length`` tokens of a request, as far as they will be written."""
        end = request.computed + length
        return self.blocks.reserve(request.id, min(max(request.computed, request.cached), end), end)

    def _left(self, scheduled: Scheduled) -> int:
        return self._budget - sum(len(c.tokens) for _, c in scheduled)

    def _chunk(self, request: Request, length: int) -> Chunk:
        end = request.computed + length
        return Chunk(
            tokens=request.tokens[request.computed : end],
            start=request.computed,
            table=self.blocks.table(request.id)[: self.blocks.blocks_for(end)],
            prompt=len(request.prompt),
            sample=end == len(request.tokens) and request.max_tokens > len(request.chosen),
            label=request.label,
            cached=request.cached,
        )
