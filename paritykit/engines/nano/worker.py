"""One rank: its part of the model and of the KV cache, and the orders it carries out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from paritykit.captures.feed import Feed
from paritykit.captures.feeder import Feeder
from paritykit.captures.manifest import Part
from paritykit.captures.recorder import Seen
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.attention import find_backend
from paritykit.engines.nano.config import NanoConfig
from paritykit.engines.nano.facts import module_facts
from paritykit.engines.nano.group import rank_device
from paritykit.engines.nano.kv import ContiguousCache, LayerCache, Slots
from paritykit.engines.nano.model import CausalLM
from paritykit.engines.nano.paged import PagedCache
from paritykit.engines.nano.parameter import Build
from paritykit.engines.nano.place import Place
from paritykit.engines.nano.recording import Recording
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.step import Plan, Step
from paritykit.engines.nano.watch import plan_accesses, watch_caches
from paritykit.engines.nano.weights import load_checkpoint
from paritykit.engines.slots import SlotWatch
from paritykit.engines.strays import Watched
from paritykit.errors import EngineError
from paritykit.provenance.weightmap import RankLedger
from paritykit.registry import load_attribute


def build_model(config: NanoConfig, settings: Settings, place: Place) -> CausalLM:
    """The model as far as one rank has it, its weights not loaded."""
    device = rank_device(settings.device, rank=place.rank, gpus=torch.cuda.device_count())
    build = Build(place.group, getattr(torch, settings.dtype), device, place.stage)
    return CausalLM(config, build, backend=find_backend(settings.attention_backend)).eval()


class Worker:
    """Built with every setting resolved. Its methods are called on all ranks alike."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self.settings, self.place, self.group = settings, place, place.group
        self.model = build_model(NanoConfig.of(Checkpoint(Path(settings.model))), settings, place)
        self.device = next(self.model.parameters()).device
        if settings.before_load:
            prepare = load_attribute(settings.before_load, kind="before_load function")
            prepare(self.model, rank=place.rank, **settings.before_load_args)
        self._ledger = load_checkpoint(
            self.model, Path(settings.model), rank=place.rank, provenance=settings.provenance
        )
        self.caches = [self.make_cache() for _ in self.model.attentions()]
        for (_, attention), cache in zip(self.model.attentions(), self.caches, strict=True):
            attention.attn.cache = cache
        self._recording: Recording | None = None
        self._watch: SlotWatch | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        found: torch.dtype = getattr(torch, self.settings.dtype)
        return found

    def make_cache(self, num_blocks: int = 0) -> LayerCache:
        """An empty cache for one layer, with blocks as in the settings."""
        settings, heads = self.settings, self.model.attentions()[0][1].qkv_proj.kv_heads
        slots = (num_blocks or settings.num_blocks) * settings.block_size
        keys, values = (
            Slots(slots, heads, self.model.config.head_dim, dtype=getattr(torch, settings.kv_dtype), device=self.device)
            for _ in range(2)
        )
        return (PagedCache if settings.kv == "paged" else ContiguousCache)(keys, values, settings.block_size)

    def run(self, plan: Plan) -> torch.Tensor:
        """Compute a step; logits ``[sampled chunks, vocabulary]``, on rank 0 and on the last stage."""
        # A recording knows a tensor again by its version, and what inference mode makes has none.
        with torch.inference_mode() if self._recording is None else torch.no_grad():
            return self._compute(plan)

    def _compute(self, plan: Plan) -> torch.Tensor:
        for source, target in plan.copies:
            for cache in self.caches:
                cache.copy(source, target)
        if self._watch is not None and plan.copies:
            self._watch.adopt([target for _, target in plan.copies], size=self.settings.block_size)
        step = Step.make(plan, block_size=self.settings.block_size, device=self.device)
        recording = self._recording
        if recording is not None:
            recording.begin(step)
        shape = len(step.ids), self.model.config.hidden_size
        hidden = self.model(step, self.place.receive_hidden(*shape, dtype=self.dtype, device=self.device))
        self.place.send_hidden(hidden)
        logits = self._logits(hidden, step)
        if recording is not None:
            recording.end()
        if self._watch is not None:
            self._watch.after_step(plan_accesses(plan, self.settings.block_size))
        return self.place.bring_logits(logits)

    def _logits(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """Those of the sampled rows; where there is no head, room for them."""
        recording = self._recording
        if not self.place.stage.last:
            return hidden.new_empty(len(step.sampled), self.model.config.vocab_size)
        if recording is not None and recording.wants_logits:
            whole = self.model.compute_logits(hidden)
            recording.logits(Seen("logits", whole))
            return whole[step.sampled]
        return self.model.compute_logits(hidden[step.sampled]) if step.sampled else hidden.new_empty(0, 0)

    def begin(self, folder: str, points: list[str] | None, feed: bytes, cases: list[str]) -> None:
        """Start recording into ``folder``; a recording that was left open is dropped.

        ``feed`` (JSON, empty for none) is what the run is fed, ``cases`` the ids of the cases by their labels.
        """
        self.end()
        rank, feeder = self.place.rank, None
        if feed:
            feeder = Feeder(msgspec.json.decode(feed, type=Feed), rank=rank, cases=cases)
        self._recording = Recording(self.model, Path(folder), rank=rank, points=points, feeder=feeder)

    def end(self) -> tuple[Part, str]:
        """Stop recording; this rank's part, and the error that ended it early, if any."""
        recording, self._recording = self._recording, None
        return recording.finish() if recording is not None else (Part(), "")

    @torch.no_grad()
    def record_cache(self, label: int, table: list[int], length: int) -> None:
        """Record what the cache holds of a request that ends."""
        if self._recording is not None:
            self._recording.cache(label, table, length)

    @torch.no_grad()
    def poison(self, value: float) -> None:
        """Fill every slot of every cache, and watch from now on what is written to them."""
        for cache in self.caches:
            cache.keys.fill(value)
            cache.values.fill(value)
        names = [n for n, _ in self.model.attentions()]
        self._watch = watch_caches(names, self.caches, rank=self.place.rank)

    @torch.no_grad()
    def refill(self, live: list[int]) -> None:
        """Fill every block but the ``live`` ones again, if the caches are watched."""
        if self._watch is not None:
            self._watch.refill({0: live}, sizes={0: self.settings.block_size})

    @torch.no_grad()
    def watched(self) -> Watched | None:
        """Stop watching; what was seen since the caches were filled, None if they were not."""
        watch, self._watch = self._watch, None
        return None if watch is None else watch.finish()

    def facts(self) -> dict[str, Any]:
        """See ``module_facts``; ``cache`` is the dtype of the numbers in the KV cache."""
        return {**module_facts(self.model), "cache": self.settings.kv_dtype}

    def ledger(self) -> RankLedger:
        """Where this rank's loader put every weight. Raises EngineError if it was not traced."""
        if self._ledger is None:
            raise EngineError("nano's loader was not traced: provenance is off")
        facts = self.facts()
        stage = self.place.stage.number
        return msgspec.structs.replace(self._ledger, names=facts["names"], fused=facts["fused"], stage=stage)

    def call(self, target: str, arguments: dict[str, Any]) -> None:
        """``package.module:function(worker, **arguments)``, to change a loaded model under test."""
        load_attribute(target, kind="after_load function")(self, **arguments)

    def load(self, folder: str) -> None:
        """Load other weights of the same shapes."""
        load_checkpoint(self.model, Path(folder))

    def save_parameters(self, folder: str) -> None:
        """Write every parameter as this rank holds it, to ``rank<n>.safetensors``."""
        tensors = {n: p.data.detach().cpu().clone() for n, p in self.model.named_parameters()}
        save_file(tensors, Path(folder) / f"rank{self.place.rank}.safetensors")
