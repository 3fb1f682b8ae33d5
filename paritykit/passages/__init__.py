"""Real text as an input: the passages that ship with ParityKit, and what turns text and chats into token ids."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Protocol

import msgspec


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat: who speaks (``system``, ``user``, ``assistant``), and the words."""

    role: str
    content: str


class Tokenizer(Protocol):
    """What a model's tokenizer is asked. Both raise UsageError where it cannot be loaded or refuses its input."""

    @property
    def has_template(self) -> bool:
        """Whether it knows how the model's chats are written."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the model's inputs begin or end with."""

    def render(self, messages: tuple[Message, ...]) -> list[int]:
        """The ids of a chat by the model's template, up to where the assistant's answer begins or goes on."""


class Passage(msgspec.Struct, frozen=True, kw_only=True):
    """A text or a chat, not yet token ids; ``file`` names a text that ships with ParityKit."""

    kind: str = ""
    file: str = ""
    text: str = ""
    messages: tuple[Message, ...] = ()
    new_tokens: int = 8

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids for a model. A shipped chat is written as plain lines for a model that has no template.

        Raises what the tokenizer raises.
        """
        if not self.messages:
            return tokenizer.encode(_read(self.file) if self.file else self.text)
        if self.kind and not tokenizer.has_template:
            return tokenizer.encode("\n".join(f"{m.role}: {m.content}" for m in self.messages))
        return tokenizer.render(self.messages)


CHAT = (
    Message("system", "You answer in one short sentence."),
    Message("user", "My kettle boils in four minutes and my neighbour's in three. Whose tea is ready first?"),
    Message("assistant", "Your neighbour's, by a minute, if both kettles are switched on at the same time."),
    Message("user", "And if I switch mine on two minutes earlier?"),
)
PASSAGES: dict[str, Passage] = {
    "text-numbers": Passage(kind="a small table of numbers", file="numbers.txt"),
    "text-chat": Passage(kind="a chat of four turns", messages=CHAT),
    "text-languages": Passage(kind="seven languages and signs", file="languages.txt"),
    "text-code": Passage(kind="a Python module", file="code.txt"),
    "text-prose": Passage(kind="a story", file="prose.txt"),
}
"""From a few dozen to about 2,000 tokens, the shortest first; written for this purpose."""


@cache
def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8").rstrip("\n")
