"""Tokenizers for tiny models: real ones, of bytes, with a chat template or without."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paritykit.testing import tiny_model

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One id for each byte, 256 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)


def tokenized(folder: Path, family: str = "qwen2", *, template: str | None = TEMPLATE) -> Path:
    """A tiny model with a tokenizer, in a new folder."""
    shutil.copytree(tiny_model(family), folder)
    byte_tokenizer(template).save_pretrained(folder)
    return folder
