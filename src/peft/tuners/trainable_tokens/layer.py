"""The layer of trainable tokens: an embedding, or a head, with other rows for a few tokens.

Each adapter holds those rows whole (upstream's name for them, `trainable_tokens_delta`, notwithstanding), so merging
writes them into the table and unmerging puts the old ones back. A head that shares the embedding's weight shares the
adapter too: it is `tied_to` the embedding's layer.

Shape letters: T trained tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.placement import offload_hook
from ...utils.quantization_utils import packed_state
from ..tuners_utils import BaseTunerLayer


class TrainableTokensLayer(BaseTunerLayer, nn.Module):
    """Trainable tokens of an embedding, or of a linear layer with one output per token.

    Args:
        tied_to: the layer of the module that has the same weight; this one then has no parameters of its own.
        in_wrapper: whether a tied layer is left out of files, as upstream does it beside other methods.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices",)
    keeps_ties = True  # what is tied to the base layer has the same adapter
    saves_embeddings = False

    def __init__(self, base_layer: nn.Module, tied_to: TrainableTokensLayer | None = None, in_wrapper: bool = False):
        super().__init__(base_layer)
        self.__dict__["tied_to"] = tied_to  # not one of the parts of this module
        self._followers: list[TrainableTokensLayer] = []
        self._in_wrapper = in_wrapper
        if tied_to is not None:
            self.trainable_tokens_delta, self.token_indices = tied_to.trainable_tokens_delta, tied_to.token_indices
            tied_to._followers.append(self)

    def _set_flags(self, name, train):
        if self.tied_to is None:  # else the partner decides what trains
            super()._set_flags(name, train)

    @property
    def stored_as(self):
        return self.tied_to if self._in_wrapper and self.tied_to is not None else self

    @property
    def _is_table(self) -> bool:
        return self.op.kind == "Embedding"

    def _rows(self, W: torch.Tensor) -> torch.Tensor:
        """`W` with one row per token, (V, D), or back."""
        return W.T if self._is_table else W

    def update_layer(self, name, config):
        if self.tied_to is not None:
            return
        tokens, shape = config.token_indices, self.op.weight_shape
        count, width = reversed(shape) if self._is_table else shape
        if not tokens or max(tokens) >= count:
            raise ValueError(
                f"token_indices must name tokens of the {count} that {type(self.get_base_layer()).__name__} has, got "
                f"{list(tokens)}"
            )
        if self.merged:
            raise ValueError("A new adapter starts from the base weights: call unmerge_adapter() first")
        self.token_indices[name] = list(tokens)
        rows = torch.randn(len(tokens), width)
        if config.init_weights and not rows.is_meta:
            rows = self.base_rows(tokens)
        self.trainable_tokens_delta[name] = nn.Parameter(rows)

    def base_rows(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """The base layer's rows of some tokens, (T, D), a copy."""
        return self._rows(self.op.load()[0].detach())[tokens]

    def check_active(self, adapter_names):
        """Refuse adapters that replace the same tokens."""
        here = [name for name in adapter_names if name in self._available_adapters]
        counts = Counter(token for name in here for token in self.token_indices[name])
        twice = sorted(token for token, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"Only one adapter can replace a token's embedding, but {here} share the tokens {twice}")

    def post(self, name, x, y, before=()):
        rows = self.trainable_tokens_delta[name]
        tokens = torch.tensor(self.token_indices[name], device=y.device)
        if self._is_table:
            ordered, order = tokens.sort()
            at = torch.searchsorted(ordered, x.long().contiguous()).clamp(max=len(tokens) - 1)
            new = self.op.op_on(order[at], tokens, rows)
            return torch.where((ordered[at] == x).unsqueeze(-1), new.to(y.dtype), y)
        change = rows - self.base_rows(tokens)  # by itself, so that a new adapter changes not even the rounding
        return y.index_add(-1, tokens, F.linear(x, change.to(x.dtype)).to(y.dtype))

    @property
    def base_is_apart(self):
        return not self._is_table or self.op.own_forward is None

    def _apply_adapters(self, names, x, *args, **kwargs):
        if not self.base_is_apart:
            return self.op.op(x, *self.folded(names), *args, **kwargs)  # which rows are taken only its forward knows
        return super()._apply_adapters(names, x, *args, **kwargs)

    def _with_rows(self, name: str, W: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        tokens = torch.tensor(self.token_indices[name], device=W.device)
        return self._rows(self._rows(W).index_copy(0, tokens, rows.to(W)))

    def fold(self, name, W, b):
        return self._with_rows(name, W, self.trainable_tokens_delta[name]), b

    def remember(self, name, W, b):
        return self._rows(W.detach())[self.token_indices[name]]

    def unfold(self, name, W, b, memory):
        return self._with_rows(name, W, memory), b

    # The weight of a tied layer is changed where its partner's is.

    def merge(self, safe_merge=False, adapter_names=None):
        if self.tied_to is None:
            super().merge(safe_merge, adapter_names)
            self._hand_on()
            return
        if offload_hook(self.get_base_layer()) is not None:
            raise RuntimeError("Tokens of tied weights that are off-loaded cannot be merged: do it without off-loading")
        self.merged_adapters += self._mergeable(self.active_adapters if adapter_names is None else adapter_names)

    def unmerge_to(self, count):
        if self.tied_to is None:
            super().unmerge_to(count)
            self._hand_on()
        else:
            del self.merged_adapters[count:]

    def _hand_on(self) -> None:
        """Give a packed weight that was made anew to the tied layers; plain ones are changed in place."""
        for layer in self._followers:
            for name, value in (packed_state(self.get_base_layer()) or {}).items():
                setattr(layer.get_base_layer(), name, value)
