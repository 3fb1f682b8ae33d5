"""Whether a config makes a model that works: how far it gets, and what stops it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

from paritykit.testing.drawn.catalogue import config_class, find_class
from paritykit.testing.drawn.weights import fill_model

PROBE = 24
"""Tokens of the text that a model is tried on: longer than the windows are."""
NOT_CAUSAL = "the model is not causal"
STAGES = ("config", "model", "forward", "finite", "cached", "causal", "alive")
CAUSAL_LIMIT, ALIVE_LIMIT = 1e-4, 1e-4
"""How far logits may move, and must, of their size: float32 rounds some 1e-6 in four layers."""
LARGEST = 20_000_000
"""Parameters: a model of more is not tiny."""


@dataclass(frozen=True)
class Tried:
    """How far a config came: ``stage`` is the last of ``STAGES`` that it passed, plus one; ``error`` what stopped it.

    ``logits`` are those of the probe, ``[tokens, vocabulary]``, and ``state`` the names and shapes of all weights.
    """

    stage: int
    error: str = ""
    model: Any = None
    logits: Any = None

    @property
    def works(self) -> bool:
        """Whether everything was passed."""
        return self.stage == len(STAGES)

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its weights by name."""
        return {n: tuple(t.shape) for n, t in self.model.state_dict().items()}


def make_config(model_type: str, fields: dict[str, Any]) -> Any:
    """The config of these fields, tables for parts of it, as it is after it was written and read back."""
    kind = config_class(model_type)
    return kind.from_dict(kind._decode_special_floats(json.loads(kind(**fields).to_json_string())))


def try_fields(model_type: str, fields: dict[str, Any], *, seed: int) -> Tried:
    """Build the model, fill it, run it on a few tokens. Every error of the class's own is an answer."""
    import torch

    stage, model, logits = 0, None, None
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            config = make_config(model_type, fields)
            stage = 1
            _check_size(model_type, config)
            model = find_class(model_type)._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
            stage = 2
            fill_model(model, seed=seed)
            logits, stage = _probe(model, 0), 3
            _finite(logits)
            for check in (_cached, _causal, _alive):
                stage += 1
                check(model, logits)
            return Tried(len(STAGES), "", model, logits)
        except Exception as error:  # a model class may raise anything of sizes that do not fit
            return Tried(stage, f"{type(error).__name__}: {error}", model, logits)


def _check_size(model_type: str, config: Any) -> None:
    import torch

    with torch.device("meta"):
        size = sum(p.numel() for p in find_class(model_type)._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are more than {LARGEST:,}")


def probe_tokens(size: int, *, changed: int = -1) -> Any:
    """``[1, tokens]``: a text without meaning; of it the token at ``changed`` is another."""
    import torch

    tokens = (torch.arange(PROBE) * 7919 + 11) % size
    if changed >= 0:
        tokens[changed] = (tokens[changed] + size // 2) % size
    return tokens[None]


def _probe(model: Any, changed: int) -> Any:
    size = model.config.get_text_config(decoder=True).vocab_size
    out = model(probe_tokens(size, changed=changed - 1), use_cache=False)
    return out.logits[0].float()


def _finite(logits: Any) -> None:
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    if not float(logits.std()) > 0:
        raise ValueError("its logits are all the same")


def _cached(model: Any, _: Any) -> None:
    """It also runs with the cache that it makes by itself."""
    model(probe_tokens(model.config.get_text_config(decoder=True).vocab_size), use_cache=True)


def _causal(model: Any, logits: Any) -> None:
    """A token changes nothing before it."""
    moved = (_probe(model, PROBE) - logits)[:-1].abs().max() / logits.abs().max()
    if not float(moved) < CAUSAL_LIMIT:
        raise ValueError(f"a token changes what is computed before it: {NOT_CAUSAL}")


def _alive(model: Any, logits: Any) -> None:
    """A token changes what is computed after it, beyond its own place."""
    moved = (_probe(model, PROBE - 2) - logits)[-2:].abs().max() / logits.abs().max()
    if not float(moved) > ALIVE_LIMIT:
        raise ValueError("a token changes nothing that is computed after it: attention does nothing")
