"""Attention with trained tokens beside its own: `y + g softmax(q K^T / sqrt(d)) V`, with K, V of the tokens.

arXiv 2303.16199, section 3.2; there the tokens and the text have a softmax each, and the gate g is one number, 0 at the
beginning.

Letters: B rows, L tokens of the text, A trained tokens, H heads, h key-value heads, d size of a head, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from ...utils.mixed_batch import run_by_row
from ..tuners_utils import BASE_ADAPTER, BaseTunerLayer, as_list


def _heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, L, H d) -> (B, H, L, d)."""
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)


class _Llama:
    """Projections of their own, rotated queries; what is read goes through the output projection."""

    target = "self_attn"

    @staticmethod
    def query(attention, hidden, kwargs):
        query = _heads(attention.q_proj(hidden), attention.head_dim)
        cos, sin = (part.unsqueeze(1) for part in kwargs["position_embeddings"])
        first, second = query.chunk(2, dim=-1)
        return query * cos + torch.cat([-second, first], dim=-1) * sin

    @staticmethod
    def keys_values(attention, tokens):
        return attention.k_proj(tokens), attention.v_proj(tokens)

    @staticmethod
    def out(attention, read):
        return attention.o_proj(read)


class _GPT2:
    """One projection for all three; what is read is added as it is, as upstream's files mean it."""

    target = "attn"

    @staticmethod
    def query(attention, hidden, kwargs):
        return _heads(attention.c_attn(hidden)[..., : attention.split_size], attention.head_dim)

    @staticmethod
    def keys_values(attention, tokens):
        return attention.c_attn(tokens).split(attention.split_size, dim=2)[1:]

    @staticmethod
    def out(attention, read):
        return read


KINDS = {"llama": _Llama, "mistral": _Llama, "gpt2": _GPT2}


class _Weightless:
    """What stands for an `Op` where there is no weight to fold into."""

    shared = is_parted = is_read = False
    bias = None

    def __init__(self, layer: nn.Module):
        self.weight = next(layer.parameters())  # any, for its type

    def retie(self) -> None:
        """Nothing was merged that could have parted weights."""


class AdaptedAttention(BaseTunerLayer, nn.Module):
    """An attention module with trained tokens, `adaption_prompt` (1, A, D) and `adaption_gate` (1)."""

    adapter_layer_names = ("adaption_prompt", "adaption_gate")
    kind: type  # one of `KINDS`

    def __init__(self, base_layer: nn.Module, kind: type, width: int):
        nn.Module.__init__(self)
        BaseTunerLayer.__init__(self, base_layer)
        self.kind, self.width = kind, width
        self.adaption_prompt = nn.ParameterDict()
        self.adaption_gate = nn.ParameterDict()

    def update_layer(self, name, config):
        self.adaption_prompt[name] = nn.Parameter(torch.randn(1, config.adapter_len, self.width))
        self.adaption_gate[name] = nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        names = kwargs.pop("adapter_names", None)
        output = self.base_layer(*args, **kwargs)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        ways = list(names or self.active_adapters[:1])
        ways = [name if name in self._available_adapters else BASE_ADAPTER for name in ways]
        if self.disable_adapters or set(ways) <= {BASE_ADAPTER}:
            return output
        query = self.kind.query(self.base_layer, hidden, kwargs)  # (B, H, L, d)
        change = run_by_row(self._read, ways, (query,), {}) if names else self._read(ways[0], query)
        return (output[0] + change, *output[1:])

    def _read(self, name: str, query: torch.Tensor) -> torch.Tensor:
        """What the text reads from an adapter's tokens, (B, L, D)."""
        rows, heads, length, size = query.shape
        if name == BASE_ADAPTER:
            return query.new_zeros(rows, length, self.width)
        tokens = self.adaption_prompt[name].to(query.dtype)
        keys, values = (_heads(each, size) for each in self.kind.keys_values(self.base_layer, tokens))
        groups = heads // keys.shape[1]
        keys, values = (each.repeat_interleave(groups, dim=1) for each in (keys, values))  # (1, H, A, d)
        scores = query @ keys.transpose(2, 3) / size**0.5
        read = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype) @ values
        read = self.adaption_gate[name].to(query.dtype) * read.transpose(1, 2).reshape(rows, length, heads * size)
        return self.kind.out(self.base_layer, read)

    def set_adapter(self, adapter_names, inference_mode=False):
        if len(as_list(adapter_names)) > 1:
            raise ValueError(f"One adaption prompt can be active at a time, got {as_list(adapter_names)}")
        super().set_adapter(adapter_names, inference_mode)

    # There is no weight that could hold it.

    @property
    def op(self) -> _Weightless:
        return _Weightless(self.get_base_layer())

    def merge(self, safe_merge=False, adapter_names=None) -> None:
        raise TypeError(
            "LLaMA-Adapter adds tokens for the attention to read; they cannot be merged into weights: use the adapter "
            "as it is, or unload() for the base model"
        )

    def check_merge(self, adapter_names) -> None:
        self.merge()
