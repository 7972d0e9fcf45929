"""Tensors by the names of adapters that are not trained: buffers, so that they move with the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class BufferDict(nn.Module):
    """A mapping of names to buffers. One that several modules hold is one: what happens to it, all of them see.

    Buffers that are equal when they come share their memory, until another value is loaded under one of the names.
    """

    def add(self, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
        """Put a tensor under a name; `persistent` says whether it is in the state dict."""
        here = [own for own in self.values() if own.shape == tensor.shape and not (own.is_meta or tensor.is_meta)]
        equal = (own for own in here if torch.equal(own, tensor.to(own)))
        self.register_buffer(name, next(equal, tensor), persistent)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, own in self.items():
            new, is_shared = state_dict.get(prefix + name), sum(own is other for other in self.values()) > 1
            if is_shared and new is not None and not torch.equal(new.to(own), own):
                self._buffers[name] = own.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

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
