"""From a module's tensor to rows of tokens, for engines that compute in ``[batch, sequence, ...]``."""

from __future__ import annotations

import torch


class DenseLayout:
    """Finds the token axes of tensors in a forward of ``[batch, sequence]`` and drops padded places.

    Shapes understood: ``[batch, sequence, ...]``, ``[batch * sequence, ...]``, ``[batch, x, sequence, ...]`` (heads
    before tokens) and ``[1, sequence, ...]`` in a larger batch. Where a shape fits two readings (as many tokens as
    heads), the reading that the point had before decides, and tokens before heads otherwise.
    """

    def __init__(self) -> None:
        self._second: dict[str, bool] = {}
        self._batch = self._length = 0
        self._keep: torch.Tensor | None = None

    def set(self, batch: int, length: int, *, keep: torch.Tensor | None = None) -> None:
        """The next forward is ``[batch, length]``; ``keep``, bool ``[batch, length]``, is False at padding."""
        self._batch, self._length = batch, length
        self._keep = None if keep is None or bool(keep.all()) else keep.reshape(-1)

    def rows(self, tensor: torch.Tensor, key: str) -> torch.Tensor | None:
        """``[tokens, ...]`` of the real tokens, sequence after sequence; None where there is no token axis."""
        flat = self._flat(tensor, key)
        return flat if flat is None or self._keep is None else flat[self._keep.to(flat.device)]

    def _flat(self, tensor: torch.Tensor, key: str) -> torch.Tensor | None:
        shape, batch, length = tensor.shape, self._batch, self._length
        first = tensor.dim() >= 2 and shape[0] == batch and shape[1] == length
        second = tensor.dim() >= 4 and shape[0] == batch and shape[2] == length
        if first != second:
            self._second[key] = second
        if second and (not first or self._second.get(key, False)):
            return tensor.transpose(1, 2).flatten(0, 1)
        if first:
            return tensor.flatten(0, 1) if tensor.dim() > 2 else tensor.reshape(-1, 1)
        if tensor.dim() >= 2 and shape[0] == batch * length:
            return tensor
        if tensor.dim() >= 3 and shape[0] == 1 and shape[1] == length:
            return tensor.expand(batch, *shape[1:]).flatten(0, 1)
        return None
