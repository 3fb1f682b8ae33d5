"""Rules on the embedding and the head: does what the config says about tying them fit what is stored?"""

from __future__ import annotations

from collections.abc import Iterator

from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice
from paritykit.audit.reads import vllm_looks_for_head

CODE = "tie-mismatch"


def tie(folder: Folder) -> Iterator[Notice]:
    """``tie_word_embeddings`` against the tensors."""
    model = folder.model
    if not model.built or not model.head or not model.embedding:
        return
    head, embedding = model.stored_head, model.stored_embedding
    if embedding and head:
        yield from _both(folder, head, embedding) if model.tied else ()
    elif embedding and not model.tied and model.head in model.missing:
        yield _no_head(folder)
    elif head and (model.tied or model.embedding in model.missing):
        yield _no_embedding(folder)
    elif not head and model.embedding in model.missing and not any(f.trouble for f in folder.files.values()):
        yield _neither(folder)


def _both(folder: Folder, head: str, embedding: str) -> Iterator[Notice]:
    same = _equal(folder, head, embedding)
    if same is None:
        said, hf, vllm = "were not compared", "ties them if they are equal", "takes the embedding"
    elif same:
        said, hf, vllm = "are equal", "ties them", "takes the embedding, which is the same"
    else:
        said = "differ"
        hf = "computes logits with the stored head, and warns; before version 5 it took the embedding"
        vllm = _vllm_head(folder, head)
    yield Notice(
        code=CODE,
        severity="error" if same is False else "note",
        place=head,
        message=f"tie_word_embeddings is true, but {head} is stored beside {embedding}; they {said}",
        hf=hf,
        vllm=vllm,
        fix='set "tie_word_embeddings": false' if same is False else f"{head} may be left out",
    )


def _vllm_head(folder: Folder, head: str) -> str:
    """What the installed vLLM takes; it learned to look for a stored head, in safetensors only."""
    safe = all(f.endswith(".safetensors") for f in folder.vllm.files) and head.endswith("lm_head.weight")
    if vllm_looks_for_head() and safe:
        return "computes logits with the stored head; older versions drop it and take the embedding"
    return "drops the stored head and computes logits with the embedding"


def _equal(folder: Folder, head: str, embedding: str) -> bool | None:
    one, other = folder.tensors[head], folder.tensors[embedding]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    sources = folder.sources(folder.hf) or folder.sources(folder.vllm)
    scans = [folder.scans.get((sources.get(n, ""), n)) for n in (head, embedding)]
    return scans[0].digest == scans[1].digest if scans[0] and scans[1] else None


def _no_head(folder: Folder) -> Notice:
    model = folder.model
    written = "false" if "tie_word_embeddings" in str(folder.config) else "not given, and false by default"
    return Notice(
        code=CODE,
        severity="error",
        place=model.head,
        message=f"tie_word_embeddings is {written}, but the checkpoint has no {model.head}",
        hf="warns and starts with a random head, another one at each start",
        vllm="loads without a word and computes logits with what the memory held",
        fix='set "tie_word_embeddings": true if the head is the embedding, or get the file that holds the head',
    )


def _no_embedding(folder: Folder) -> Notice:
    model = folder.model
    hf = "takes the head as the embedding" if model.tied else "warns and starts with a random embedding"
    return Notice(
        code=CODE,
        severity="error",
        place=model.embedding,
        message=f"the checkpoint has {model.head} but no {model.embedding}; "
        f"tie_word_embeddings is {str(model.tied).lower()}",
        hf=hf,
        vllm="takes the tied weight from the embedding's name only: it computes with what the memory held"
        if model.tied
        else "loads without a word and computes with what the memory held",
        fix=f"store the tensor as {model.embedding}",
    )


def _neither(folder: Folder) -> Notice:
    return Notice(
        code="missing-tensor",
        severity="error",
        place=folder.model.embedding,
        message=f"the checkpoint has neither {folder.model.embedding} nor {folder.model.head}",
        hf="warns and starts with random values, others at each start",
        vllm="loads without a word and computes with what the memory held",
        fix="get the file that holds it",
    )


RULES = (tie,)
