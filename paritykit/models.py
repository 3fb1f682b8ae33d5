"""What a user may write for MODEL: a folder, a hub id, ``tiny:FAMILY,FIELD=VALUE`` or ``drawn:MODEL_TYPE,seed=N``."""

from __future__ import annotations

from paritykit.case import Tokenize
from paritykit.engines.checkpoint import Checkpoint
from paritykit.testing.drawn.named import DRAWN, DrawnModel
from paritykit.testing.named import TINY, TinyModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def resolve_model(model: str) -> Checkpoint:
    """The checkpoint for what the user wrote; ``tiny:qwen2`` is made on the spot.

    Raises UsageError if there is none, or if the headers of its weight files show that they are damaged.
    """
    found = Checkpoint.find(folder_of(model))
    _ = found.tensors
    return found


def folder_of(model: str) -> str:
    """``model``, or the folder of the tiny model that ``tiny:...`` or ``drawn:...`` means, made on the spot."""
    if model.startswith(DRAWN):
        return str(DrawnModel(model).build())
    return str(TinyModel(model).build()) if model.startswith(TINY) else model


def tokenizer_of(checkpoint: Checkpoint) -> Tokenize | None:
    """A function from text to token ids, loaded on first use; None where the checkpoint has no tokenizer."""
    if not any((checkpoint.path / n).is_file() for n in TOKENIZER_FILES):
        return None

    def tokenize(text: str) -> list[int]:
        from transformers import AutoTokenizer

        return list(AutoTokenizer.from_pretrained(checkpoint.path)(text)["input_ids"])

    return tokenize
