"""The records themselves, one JSON object a line."""

from __future__ import annotations

from paritykit.results import Results, encode_record


def render(results: Results) -> bytes:
    """Every record of ``results`` in file order, as ``read_jsonl`` reads it back."""
    return b"\n".join(encode_record(record) for record in results.records()) + b"\n"
