"""Rules on splitting the model over several ranks."""

from __future__ import annotations

from collections.abc import Iterator

from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice, Severity

HEADS = ("num_attention_heads", "n_head")
KV_HEADS = ("num_key_value_heads",)
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
HIDDEN = ("hidden_size", "n_embd")
PADDING = 64
"""vLLM pads the vocabulary to a multiple of this before it is split."""


def heads(folder: Folder) -> Iterator[Notice]:
    """Attention heads must split evenly, key and value heads evenly or by whole copies."""
    size = folder.tensor_parallel_size
    key, total = _number(folder, HEADS)
    if total and total % size:
        message = f"{total} attention heads do not split over {size} ranks"
        yield _notice("tp-heads", "error", key, message, "refuses to start")
    kv_key, kv = _number(folder, KV_HEADS)
    if kv and kv % size and size % kv:
        message = f"{kv} key/value heads neither split over {size} ranks nor copy to them evenly"
        yield _notice("tp-kv-heads", "error", kv_key, message, "fails while building attention")
    elif kv and size > kv:
        message = f"{kv} key/value heads on {size} ranks: {size // kv} ranks hold each head"
        yield _notice("tp-kv-copies", "note", kv_key, message, "copies them: the KV cache does not shrink any further")


def widths(folder: Folder) -> Iterator[Notice]:
    """Widths of the feed-forward layers must split evenly."""
    size = folder.tensor_parallel_size
    for name in WIDTHS:
        key, width = _number(folder, (name,))
        if width and width % size:
            message = f"{key} {width} does not split over {size} ranks"
            yield _notice("tp-width", "error", key, message, "fails while building the layer: not divisible")
    key, width = _number(folder, HIDDEN)
    if width and width % size:
        message = f"{key} {width} does not split over {size} ranks"
        yield _notice("tp-hidden", "warning", key, message, "keeps it whole in most models; some split it and fail")


def vocabulary(folder: Folder) -> Iterator[Notice]:
    """The vocabulary is padded, so that it always splits."""
    size = folder.tensor_parallel_size
    key, total = _number(folder, ("vocab_size",))
    padded = -(-total // PADDING) * PADDING
    if size == 1 or not total:
        return
    if padded % size:
        message = f"the vocabulary of {total}, padded to {padded}, does not split over {size} ranks"
        yield _notice("tp-vocabulary", "error", key, message, "fails while building the embedding: not divisible")
    elif total % size:
        message = f"the vocabulary of {total} does not split over {size} ranks"
        yield _notice("tp-vocabulary", "note", key, message, f"pads it to {padded}; the last rank holds the padding")


def _number(folder: Folder, names: tuple[str, ...]) -> tuple[str, int]:
    """The first of the keys that the effective config, or else config.json, has as a number."""
    inner = folder.config.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    for name in names:
        for config in (folder.model.config, text, folder.config):
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return name, value
    return names[0], 0


def _notice(code: str, severity: Severity, place: str, message: str, vllm: str) -> Notice:
    return Notice(
        code=code,
        severity=severity,
        place=place,
        message=message,
        hf="runs it in one piece",
        vllm=vllm,
        fix="none needed" if severity == "note" else "choose another tensor_parallel_size",
    )


RULES = (heads, widths, vocabulary)
