"""The reference: a Hugging Face model, run plainly, one forward pass at a time.

Each case runs alone by default (``padding="none"``), so that nothing of its neighbours or of padding can reach it;
``padding="left"`` runs a batch as users do, and padded places are cut from what is recorded.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from paritykit.captures.feed import Feed
from paritykit.captures.feeder import make_feeder
from paritykit.captures.layout import DenseLayout
from paritykit.captures.manifest import Manifest, Segment
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Recorder, Selection
from paritykit.captures.writer import CaptureFolder, PartWriter
from paritykit.case import Case
from paritykit.comparison.ensemble import DrawPlan, Ensemble
from paritykit.engines.base import Progress, batches
from paritykit.engines.causal import carried, check_causal, check_complete
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.drawing import Drawing
from paritykit.engines.dtypes import parse_dtype
from paritykit.engines.features import experts_chosen, feature_axes, parameter_names
from paritykit.engines.kv import CacheReading
from paritykit.engines.redraw import Redrawing
from paritykit.engines.truth import check_wide, let_run, prove_wide, round_weights
from paritykit.engines.widen import widened
from paritykit.errors import EngineError, UsageError
from paritykit.results import Side


def other_meaning(module: nn.Module) -> str:
    """Why no engine has an equal of this module; empty if it may be compared."""
    if "RotaryEmbedding" in type(module).__name__:
        return "cos and sin tables; other engines apply rotary inside attention, where its effect shows"
    if hasattr(module, "embed_scale"):
        return "scaled inside the module here, outside elsewhere; compared scaled, as the first norm's input"
    return ""


class HFEngine:
    """``engine("hf", MODEL, dtype="float32")``: any ``AutoModelForCausalLM``.

    ``dtype`` float64, float32, bfloat16 or float16; ``attn_implementation`` as in transformers, ``eager`` by default;
    ``padding`` ``none`` or ``left``. In float64 the casts to float32 in transformers' code are lifted, so that all
    of it is float64; ``widen=False`` leaves them. ``weights_dtype`` rounds the weights as an engine of that dtype does,
    and computes in ``dtype`` all the same. Raises UsageError for a bad argument, EngineError if the model does not load
    or works in fewer bits all the same.
    """

    capabilities = frozenset({"decode", "draw", "logits", "replay", "teacher_forcing"})

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        attn_implementation: str = "eager",
        padding: str = "none",
        trust_remote_code: bool = False,
        widen: bool = True,
        weights_dtype: str = "",
    ) -> None:
        if padding not in ("none", "left"):
            raise UsageError(f"padding must be 'none' or 'left', not {padding!r}")
        if padding == "left":
            self.capabilities = self.capabilities - {"replay"}  # rows cannot be put back between padding
        self.checkpoint = Checkpoint.find(model)
        self._dtype = parse_dtype(self.checkpoint.dtype if dtype == "auto" else dtype)
        self._device = device
        self._attention = attn_implementation
        self._padding = padding
        self._trust = trust_remote_code
        self._widen = widen and self._dtype is torch.float64
        self._weights = parse_dtype(weights_dtype) if weights_dtype else self._dtype
        self._model: Any = None

    def open(self) -> None:
        """Load the model in evaluation mode. Raises UsageError for a model that is no causal language model."""
        check_causal(self.checkpoint, trust_remote_code=self._trust)
        try:
            with quiet(), self._precision():
                model, told = AutoModelForCausalLM.from_pretrained(
                    self.checkpoint.path,
                    dtype=self._dtype,
                    attn_implementation=self._attention,
                    trust_remote_code=self._trust,
                    output_loading_info=True,
                )
                check_complete(told["missing_keys"], kind=type(model).__name__, where=str(self.checkpoint.path))
                self._model = model.to(self._device).eval()
                if self._dtype is torch.float64:
                    let_run(model)
                if self._widen:
                    prove_wide(model, where=str(self.checkpoint.path))
            round_weights(model, self._weights)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError) as error:
            raise EngineError(f"hf cannot load {self.checkpoint.path}: {error}") from error

    def run(
        self,
        cases: list[Case],
        *,
        points: Selection,
        out: Path,
        progress: Progress | None = None,
        feed: Feed | None = None,
    ) -> Capture:
        """See ``Engine.run``; new tokens come from the model's KV cache, one step at a time."""
        feeder = make_feeder(feed, cases)
        with CaptureFolder(out) as folder, PartWriter(folder.path) as part, torch.no_grad(), self._precision():
            layout, reading = DenseLayout(), CacheReading()
            generated: dict[str, list[int]] = {}
            with Recorder(self._model, part, reading=reading, selection=points, alias=True, feeder=feeder) as recorder:
                groups = [[c] for b in batches(cases) for c in b] if self._padding == "none" else batches(cases)
                for number, group in enumerate(groups):
                    if progress:
                        progress("hf", number, len(groups))
                    generation = _Generation(self._model, group, index={c.id: i for i, c in enumerate(cases)})
                    generated |= generation.run(recorder, layout)
            facts = self._facts() | ({"fed": feeder.fed} if feeder else {})
            manifest = Manifest(side=self.describe(), cases=cases, generated=generated, facts=facts)
            written = part.finish()
            if self._widen:
                check_wide(written.points)
            return Capture.open(folder.commit(manifest, [written]), verify=False)

    def draw(
        self, cases: list[Case], *, truth: Path, out: Path, plan: DrawPlan, progress: Progress | None = None
    ) -> Ensemble:
        """Run copies of each case, each copy's rounding drawn anew by ``plan``, and measure them against a capture.

        ``cases`` are read at once, to their last forced token; ``truth`` is a capture of them. The ensemble goes into
        the new folder ``out``.
        """
        capture, redrawing = Capture.open(truth, verify=False), Redrawing(plan.seed)
        stored = redrawing.stored_in(getattr(torch, plan.cache)) if plan.cache else None
        drawing = Drawing(self._model, capture, draws=plan.draws, vocabulary=self.checkpoint.vocab_size, stored=stored)
        with torch.no_grad(), self._precision(), redrawing, quiet():
            writer = drawing.run(cases, feeder=make_feeder(plan.feed, cases), progress=progress)
        out.mkdir(parents=True)
        writer.write(out, draws=plan.draws, seed=plan.seed, dtype=str(self._dtype).removeprefix("torch."))
        return Ensemble.open(out)

    @contextmanager
    def computing(self) -> Iterator[Any]:
        """The loaded model, in whose code the engine's own dtype holds meanwhile."""
        with self._precision():
            yield self._model

    def describe(self) -> Side:
        """Versions, dtype and attention of the loaded model."""
        return Side(
            engine="hf",
            model=str(self.checkpoint.path),
            dtype=str(self._dtype).removeprefix("torch."),
            device=self._device,
            digest=self.checkpoint.digest,
            attention_backend=self._attention,
            versions={"transformers": transformers.__version__, "torch": str(torch.__version__)},
            args=self._args(),
        )

    def _args(self) -> dict[str, str]:
        wide = {"widen": str(self._widen)} if self._dtype is torch.float64 else {}
        rounded = {"weights_dtype": str(self._weights).removeprefix("torch.")} if self._weights != self._dtype else {}
        return {"padding": self._padding, **wide, **rounded}

    def close(self) -> None:
        """Drop the model."""
        self._model = None
        gc.collect()

    def _precision(self) -> AbstractContextManager[None]:
        return widened() if self._widen else nullcontext()

    def _facts(self) -> dict[str, Any]:
        """What mapping needs: where transformers put each checkpoint tensor, and modules that mean something else.

        ``routers``: module path to how many experts it chooses, see ``experts_chosen``.
        """
        head = self._model.get_output_embeddings()
        parameters = parameter_names(self._model, list(self.checkpoint.tensors))
        return {
            "parameters": parameters,
            "features": feature_axes(self._model, parameters),
            "meanings": {n: why for n, m in self._model.named_modules() if (why := other_meaning(m))},
            "routers": {n: count for n, m in self._model.named_modules() if (count := experts_chosen(m))},
            "head": next((n for n, m in self._model.named_modules() if m is head), ""),
        }


class _Generation:
    """One batch from prompt to last token."""

    def __init__(self, model: Any, group: list[Case], *, index: Mapping[str, int]) -> None:
        self._model = model
        self._group = group
        self._index = index
        self._longest = max(len(c.tokens) for c in group)
        self._device = next(model.parameters()).device

    def run(self, recorder: Recorder, layout: DenseLayout) -> dict[str, list[int]]:
        """Prefill and decode. Returns the tokens the model itself chose after each case."""
        chosen: dict[str, list[int]] = {c.id: [] for c in self._group}
        tokens = [[0] * (self._longest - len(c.tokens)) + list(c.tokens) for c in self._group]
        mask = [[0] * (self._longest - len(c.tokens)) + [1] * len(c.tokens) for c in self._group]
        cache: dict[str, Any] = {}
        for step in range(max(1, *(c.new_tokens for c in self._group))):
            segments, keep = self._labels(step, mask)
            layout.set(len(tokens), len(tokens[0]), keep=torch.tensor(keep, dtype=torch.bool))
            recorder.begin(segments, layout.rows)
            if step and not cache:
                raise EngineError(f"{type(self._model).__name__} hands on no cache to compute one token at a time with")
            output = self._forward(tokens, mask, cache)
            recorder.end()
            cache = carried(self._model, output)
            choice = output.logits[:, -1].argmax(-1).tolist()
            tokens = [[self._next(c, step, choice[i], chosen)] for i, c in enumerate(self._group)]
            mask = [[*row, 1] for row in mask]
        return chosen

    def _forward(self, tokens: list[list[int]], mask: list[list[int]], cache: dict[str, Any]) -> Any:
        extra: dict[str, Any] = {}
        if not all(all(row) for row in mask):
            attention = torch.tensor(mask, device=self._device)
            positions = (attention.cumsum(-1) - 1).clamp(min=0)[:, -len(tokens[0]) :]
            extra = {"attention_mask": attention}
            if "position_ids" in signature(self._model.forward).parameters:
                extra["position_ids"] = positions
        ids = torch.tensor(tokens, device=self._device)
        with quiet():
            return self._model(input_ids=ids, use_cache=True, **cache, **extra)

    def _labels(self, step: int, mask: list[list[int]]) -> tuple[list[Segment], list[list[bool]]]:
        """Row labels of this step, and which places are real: padding and finished cases are not."""
        segments, keep = [], []
        for case, row in zip(self._group, mask, strict=True):
            live = step < max(case.new_tokens, 1)
            places = row if step == 0 else row[-1:]
            keep.append([bool(p) and live for p in places])
            if live:
                start = 0 if step == 0 else len(case.tokens) + step - 1
                segments.append(Segment(self._index[case.id], start, len(case.tokens) if step == 0 else 1))
        return segments, keep

    @staticmethod
    def _next(case: Case, step: int, choice: int, chosen: dict[str, list[int]]) -> int:
        if step < case.new_tokens:
            chosen[case.id].append(choice)
        return case.forced[step] if step < len(case.forced) else choice


@contextmanager
def quiet() -> Iterator[None]:
    """Library warnings are not the user's business here; errors still are."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
