"""Tensors by the names of adapters that are not trained: buffers, so that they move with the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class BufferDict(nn.Module):
    """A mapping of names to buffers. One that several modules hold is one: what happens to it, all of them see."""

    def add(self, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
        """Put a tensor under a name; `persistent` says whether it is in the state dict."""
        self.register_buffer(name, tensor, persistent)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.add(name, tensor)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self):
        return self._buffers.keys()

    def values(self):
        return self._buffers.values()

    def items(self):
        return self._buffers.items()
