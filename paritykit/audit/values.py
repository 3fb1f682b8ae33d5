"""Rules on what the data holds: NaN and Inf, absurd sizes, zeros, dtypes, damage against the hub's digest."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice, by_pattern, count
from paritykit.audit.scan import CHUNK, FLOATS, magnitude

HUGE = 1e10
"""No weight of a trained model is anywhere near; a flipped exponent bit usually is."""
MASKS = re.compile(r"(mask|masked_bias|attn\.bias)$")
"""Buffers of old checkpoints that hold -Inf or large negative numbers on purpose; engines make their own."""
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def nonfinite(folder: Folder) -> Iterator[Notice]:
    """NaN and Inf, with the place of the first one."""
    for file, name, tensor, scan in folder.read_scans():
        if not scan.nonfinite or MASKS.search(name):
            continue
        used = file in folder.hf.files or file in folder.vllm.files
        yield Notice(
            code="nonfinite",
            severity="error" if used else "warning",
            place=name,
            message=f"{scan.nonfinite} of {_size(tensor.shape)} values of {name} in {file} are NaN or Inf, "
            f"the first at {address(scan.first, tensor.shape)}",
            hf="loads it; what depends on it becomes NaN" if used else "does not read this file",
            vllm="loads it; what depends on it becomes NaN, and tokens are arbitrary" if used else "does not read it",
            fix="get the file again; if it is the same at its source, the checkpoint was saved from a broken run",
        )


def huge(folder: Folder) -> Iterator[Notice]:
    """Finite values that no weight has."""
    for file, name, tensor, scan in folder.read_scans():
        top = magnitude(tensor.dtype, scan.largest)
        if scan.nonfinite or top < HUGE or MASKS.search(name):
            continue
        yield Notice(
            code="implausible-value",
            severity="warning",
            place=name,
            message=f"the largest magnitude of {name} in {file} is {top:.3g}: "
            "damaged bytes give such values, training does not",
            hf="loads it",
            vllm="loads it",
            fix="compare the file's digest with the source's and get it again",
        )


def zeros(folder: Folder) -> Iterator[Notice]:
    """Whole matrices of zeros: space that was reserved and never written."""
    seen = folder.read_scans()
    empty = [n for _, n, t, s in seen if s.largest == 0 and len(t.shape) > 1 and not n.endswith("bias")]
    for names in by_pattern(dict.fromkeys(empty)):
        yield Notice(
            code="all-zero",
            severity="warning",
            place=names[0],
            message=f"{count(names)}: every value is zero",
            hf="loads it; the module adds nothing",
            vllm="loads it; the module adds nothing",
            fix="get the file again, unless zeros are meant (an untrained addition)",
        )


def dtypes(folder: Folder) -> Iterator[Notice]:
    """One kind of tensor in two dtypes: shards from two saves."""
    tensors = folder.tensors
    for names in by_pattern(tensors):
        kinds = Counter(tensors[n].dtype for n in names)
        if len(kinds) > 1:
            odd = [n for n in names if tensors[n].dtype == kinds.most_common()[-1][0]]
            yield Notice(
                code="dtype-mixture",
                severity="warning",
                place=odd[0],
                message=f"{len(names)} tensors of one kind in {_listed(kinds)}; {odd[0]} is {tensors[odd[0]].dtype}",
                hf="casts all of them to one dtype: those stored narrower have lost digits the others have",
                vllm="casts all of them to one dtype: those stored narrower have lost digits the others have",
                fix="check that all shards come from one save",
            )


def mixture(folder: Folder) -> Iterator[Notice]:
    """Several float dtypes, each kind of tensor in one of them: usual for routers and quantized models."""
    kinds = Counter(t.dtype for t in folder.tensors.values() if t.dtype in FLOATS)
    if len(kinds) > 1:
        rare = kinds.most_common()[-1][0]
        first = next(n for n, t in folder.tensors.items() if t.dtype == rare)
        yield Notice(
            code="dtypes",
            severity="note",
            place=first,
            message=f"floats of several dtypes: {_listed(kinds)}; the first {rare} is {first}",
            hf="casts all to the dtype it computes in, except where the model keeps float32",
            vllm="casts all to the dtype it computes in, except where the model keeps float32",
            fix="none needed if the model is meant to keep these in another dtype",
        )


def against_config(folder: Folder) -> Iterator[Notice]:
    """The dtype the config names against the one that is stored."""
    weights = Counter[str]()
    for tensor in folder.tensors.values():
        if tensor.dtype in FLOATS and len(tensor.shape) > 1:
            weights[tensor.dtype] += _size(tensor.shape)
    wanted = _config_dtype(folder)
    if not weights or not wanted or folder.config.get("quantization_config"):
        return
    stored = NAMES.get(weights.most_common(1)[0][0], "")
    if wanted == "float32":
        yield Notice(
            code="dtype-float32",
            severity="note",
            place="dtype",
            message=f"config.json names float32; the weights are stored in {stored}",
            hf="computes in float32",
            vllm="with dtype='auto' computes in bfloat16 or float16 where the platform has them",
            fix="give both engines the same dtype",
        )
    if stored and wanted != stored:
        yield Notice(
            code="dtype-against-config",
            severity="warning",
            place="dtype",
            message=f"config.json names {wanted}, but the weights are stored in {stored}",
            hf=f"with dtype='auto' casts to {wanted}",
            vllm=f"with dtype='auto' casts to {'bfloat16 or float16' if wanted == 'float32' else wanted}",
            fix=f"set dtype to {stored} in config.json, or give both engines a dtype",
        )


def two_dtypes(folder: Folder) -> Iterator[Notice]:
    """``dtype`` and its old name ``torch_dtype`` with different values."""
    old, new = (str(folder.config.get(k) or "").removeprefix("torch.") for k in ("torch_dtype", "dtype"))
    if old and new and old != new:
        yield Notice(
            code="dtype-both-names",
            severity="warning",
            place="torch_dtype",
            message=f"config.json says dtype {new} and torch_dtype {old}",
            hf=f"takes dtype: {new}; versions before 4.56 take torch_dtype: {old}",
            vllm=f"asks transformers and takes {new}",
            fix="delete torch_dtype",
        )


def hub_digest(folder: Folder) -> Iterator[Notice]:
    """Files of the hub's cache, whose name there is the digest of what they should hold."""
    if not folder.deep:
        return
    for file in folder.files.values():
        stored = (folder.path / file.name).resolve()
        if stored.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", stored.name):
            found = _sha256(stored)
            if found != stored.name:
                yield Notice(
                    code="digest-mismatch",
                    severity="error",
                    place=file.name,
                    message=f"{file.name} has sha256 {found[:12]}..., but the hub says {stored.name[:12]}...",
                    hf="loads the changed bytes without noticing",
                    vllm="loads the changed bytes without noticing",
                    fix=f"delete {file.name} from the cache and download it again",
                )


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _config_dtype(folder: Folder) -> str:
    inner = folder.config.get("text_config")
    for config in (folder.config, inner if isinstance(inner, dict) else {}):
        if named := config.get("dtype") or config.get("torch_dtype"):
            return str(named).removeprefix("torch.")
    return ""


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{n} x {k}" for k, n in kinds.most_common())


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def address(flat: int, shape: tuple[int, ...]) -> list[int]:
    """The index of a flat place.

    >>> address(7, (2, 4))
    [1, 3]
    """
    found = []
    for n in reversed(shape):
        flat, last = divmod(flat, n)
        found.append(last)
    return found[::-1]


RULES = (nonfinite, huge, zeros, dtypes, mixture, against_config, two_dtypes, hub_digest)
