"""What a user may write for MODEL: a folder, a hub id, ``tiny:FAMILY,FIELD=VALUE``, ``drawn:TYPE`` or ``real:NAME``."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from paritykit.case import Case, CaseSet
from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import UsageError
from paritykit.passages import Message, Tokenizer
from paritykit.testing.names import folder_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def resolve_model(model: str) -> Checkpoint:
    """The checkpoint for what the user wrote; ``tiny:qwen2`` is made on the spot.

    Raises UsageError if there is none, or if the headers of its weight files show that they are damaged.
    """
    found = Checkpoint.find(folder_of(model))
    _ = found.tensors
    return found


def cases_for(checkpoint: Checkpoint, cases: CaseSet) -> list[Case]:
    """The cases in the ids of a checkpoint's vocabulary, checked against its length. Raises UsageError."""
    return cases.resolve(
        vocab_size=checkpoint.vocab_size,
        max_positions=checkpoint.max_positions,
        tokenizer=tokenizer_of(checkpoint),
    )


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """The checkpoint's tokenizer, loaded on first use; None where it has none."""
    if not any((checkpoint.path / n).is_file() for n in TOKENIZER_FILES):
        return None
    return FolderTokenizer(checkpoint.path)


class FolderTokenizer:
    """The tokenizer that transformers loads from a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template."""
        return bool(self._loaded.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises UsageError where the tokenizer cannot be loaded."""
        return [int(token) for token in self._loaded(text, verbose=False)["input_ids"]]

    def render(self, messages: tuple[Message, ...]) -> list[int]:
        """The ids of a chat, up to where the assistant speaks, or goes on where the last message is its own.

        Raises UsageError where there is no template, or it refuses the chat.
        """
        from jinja2 import TemplateError

        if not self.has_template:
            raise UsageError(f'the tokenizer of {self._folder} has no chat template; give "text" or "tokens"')
        going_on = messages[-1].role == "assistant"
        try:
            ids = self._loaded.apply_chat_template(
                [msgspec.to_builtins(m) for m in messages],
                add_generation_prompt=not going_on,
                continue_final_message=going_on,
                return_dict=False,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template of {self._folder} refuses these messages: {error}") from error
        return [int(token) for token in ids]

    @cached_property
    def _loaded(self) -> Any:
        try:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
        except Exception as error:  # tokenizers raises it bare for a file that it cannot read
            raise UsageError(f"the tokenizer of {self._folder} cannot be loaded: {error}") from error
