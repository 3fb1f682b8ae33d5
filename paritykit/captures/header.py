"""The header of a safetensors file: what tensors it has, and where. Torch-free."""

from __future__ import annotations

import msgspec


class Entry(msgspec.Struct):
    """One tensor of a safetensors header: its dtype code, and where its bytes lie behind the header."""

    shape: list[int]
    dtype: str
    data_offsets: tuple[int, int]


def decode_header(text: bytes) -> dict[str, Entry]:
    """The tensors of a safetensors header by name. Raises msgspec.MsgspecError or UnicodeDecodeError for none."""
    header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    header.pop("__metadata__", None)
    return {name: msgspec.json.decode(raw, type=Entry) for name, raw in header.items()}
