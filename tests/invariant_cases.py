"""The cases of `test_invariants.py`: every kind of layer (`OPS`) and every method (`METHODS`) with its formula.

Letters: N rows of a batch, O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, SftConfig, SsfConfig

N, VOCAB = 4, 11


class TinyRMSNorm(nn.Module):
    """As Llama's: no bias, no offset."""

    offset = 0.0

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (self.offset + self.weight.to(normed.dtype))).to(x.dtype)


class OffsetRMSNorm(TinyRMSNorm):
    """As Gemma's: the weight counts from 1."""

    offset = 1.0


class Net(nn.Module):
    """One target layer, `layer`, and a second of the same kind that is never a target."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.layer = make()
        self.other = make()

    def forward(self, x):
        return self.layer(x)


@dataclass
class OpCase:
    """A kind of layer: how to make one, an input, and its function written out with weight and bias given."""

    make: Callable[[], nn.Module]
    draw: Callable[[], torch.Tensor]
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    channel_dim: int = -1
    stored_transposed: bool = False
    offset: float = 0.0


def rms_norm(x, weight, bias):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


OPS: dict[str, OpCase] = {
    "linear": OpCase(lambda: nn.Linear(6, 5), lambda: torch.randn(N, 3, 6), lambda x, W, b: x @ W.T + b),
    "linear_no_bias": OpCase(lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(N, 6), lambda x, W, b: x @ W.T),
    "Conv1D": OpCase(
        lambda: Conv1D(5, 6), lambda: torch.randn(N, 3, 6), lambda x, W, b: x @ W + b, stored_transposed=True
    ),
    "conv1d": OpCase(
        lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2),
        lambda: torch.randn(N, 4, 9),
        lambda x, W, b: F.conv1d(x, W, b, padding=1, stride=2),
        channel_dim=1,
    ),
    "conv2d": OpCase(
        lambda: nn.Conv2d(4, 6, (3, 2), padding=1, dilation=(1, 2), padding_mode="circular"),
        lambda: torch.randn(N, 4, 7, 6),
        lambda x, W, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), W, b, dilation=(1, 2)),
        channel_dim=1,
    ),
    "conv3d": OpCase(
        lambda: nn.Conv3d(4, 6, 2),
        lambda: torch.randn(N, 4, 3, 4, 3),
        lambda x, W, b: F.conv3d(x, W, b),
        channel_dim=1,
    ),
    "embedding": OpCase(
        lambda: nn.Embedding(VOCAB, 6),
        lambda: (torch.randperm(N * 5) % VOCAB).view(N, 5),  # every token: no part of an adapter goes unseen
        lambda x, W, b: W[x],
        stored_transposed=True,
    ),
    "LayerNorm": OpCase(
        lambda: nn.LayerNorm(6), lambda: torch.randn(N, 3, 6), lambda x, W, b: F.layer_norm(x, (6,)) * W + b
    ),
    "RMSNorm": OpCase(lambda: TinyRMSNorm(6), lambda: torch.randn(N, 3, 6), rms_norm),
    "OffsetRMSNorm": OpCase(
        lambda: OffsetRMSNorm(6), lambda: torch.randn(N, 3, 6), lambda x, W, b: rms_norm(x, 1 + W, b), offset=1.0
    ),
}
NORMS = ("LayerNorm", "RMSNorm", "OffsetRMSNorm")
MATRICES = tuple(op for op in OPS if op not in NORMS)


# Each method's formula: (op, stored weight, bias, parameters by their path in the layer, x) -> output


def lora_formula(op: OpCase, W, b, parameters, x, scaling=2.0):
    """arXiv 2106.09685, eq. 3: `W + scaling B A`."""
    if "lora_embedding_A" in parameters:
        A, B = parameters["lora_embedding_A"], parameters["lora_embedding_B"]
    else:
        A, B = parameters["lora_A.weight"], parameters["lora_B.weight"]
    delta = scaling * torch.tensordot(B.reshape(B.shape[0], B.shape[1]), A, dims=1)
    return op.function(x, W + (delta.T if op.stored_transposed else delta), b)


def dora_formula(op: OpCase, W, b, parameters, x, scaling=2.0):
    """arXiv 2402.09353, eq. 5, with the norm a constant (section 4.3)."""
    if "lora_embedding_A" in parameters:
        A, B = parameters["lora_embedding_A"], parameters["lora_embedding_B"]
    else:
        A, B = parameters["lora_A.weight"], parameters["lora_B.weight"]
    view = W.T if op.stored_transposed else W
    V = view + scaling * torch.tensordot(B.reshape(B.shape[0], B.shape[1]), A, dims=1)
    norm = V.detach().square().sum(dim=tuple(range(1, V.dim())), keepdim=True).sqrt()
    V = V * parameters["lora_magnitude_vector.weight"].reshape(norm.shape) / norm
    return op.function(x, V.T if op.stored_transposed else V, b)


def sft_formula(op: OpCase, W, b, parameters, x):
    """arXiv 2401.16405, section 3: `W` with the values added at the positions."""
    flat = torch.zeros(W.numel(), dtype=W.dtype).scatter_add(
        0, parameters["sft_delta.indices"].long(), parameters["sft_delta.values"]
    )
    return op.function(x, W + flat.view(W.shape), b)


def sft_groups_formula(granularity: str, b: int = 2):
    """`W` with whole output channels, input channels or b x b tiles of `W[O, I, ...]` added."""

    def formula(op: OpCase, W, b_, parameters, x):
        view = W.T if op.stored_transposed else W
        delta = torch.zeros_like(view)
        for number, values in zip(parameters["sft_delta.indices"].tolist(), parameters["sft_delta.values"]):
            one = torch.zeros_like(view)
            if granularity == "row":
                one[number] = 1
            elif granularity == "column":
                one[:, number] = 1
            else:
                row, column = divmod(number, view.shape[1] // b)
                one[row * b : (row + 1) * b, column * b : (column + 1) * b] = 1
            delta = delta.masked_scatter(one.bool(), values)
        return op.function(x, W + (delta.T if op.stored_transposed else delta), b_)

    return formula


def ssf_formula(op: OpCase, W, b, parameters, x):
    """arXiv 2210.08823, eq. 4: scale and shift per output channel."""
    y = op.function(x, W, b)
    scale, shift = (parameters[name].reshape(-1, *([1] * (y.dim() - 2))) if op.channel_dim == 1 else parameters[name]
                    for name in ("ssf_scale", "ssf_shift"))  # fmt: skip
    return y * scale + shift


@dataclass
class MethodCase:
    """A method: its configuration, its formula, what it can do, and configurations that it refuses."""

    config: Callable[..., object]
    formula: Callable
    ops: tuple[str, ...] = tuple(OPS)
    unmerges_exactly: bool = False
    bad: tuple[tuple[dict, str], ...] = ()
    wide: dict = field(default_factory=dict)  # what makes the parameters as wide as a float64 base


METHODS: dict[str, MethodCase] = {
    "lora": MethodCase(
        lambda **kw: LoraConfig(r=4, lora_alpha=8, **kw),
        lora_formula,
        ops=MATRICES,
        bad=(
            ({"r": 0}, "rank must be a positive whole number, got r=0"),
            ({"r": -3}, "got r=-3"),
            ({"r": 2.5}, "r must be int, got 2.5"),
            ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
            ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
            ({"lora_dropout": -0.1}, "got -0.1"),
            ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', got 'some'"),
            ({"init_lora_weights": "best"}, "init_lora_weights must be .* got 'best'"),
        ),
    ),
    "dora": MethodCase(
        lambda **kw: LoraConfig(r=4, lora_alpha=8, use_dora=True, **kw),
        dora_formula,
        ops=MATRICES,
        unmerges_exactly=True,
        bad=(({"lora_bias": True}, "lora_bias=True has no place in DoRA"),),
    ),
    "sft": MethodCase(
        lambda **kw: SftConfig(**{"num_tunable_weights": 5, **kw}),
        sft_formula,
        unmerges_exactly=True,
        wide={"dtype": "auto"},
        bad=(
            ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
            ({"density": 1.5}, "got 1.5"),
            ({"num_tunable_weights": 0}, "num_tunable_weights must be positive, got 0"),
            ({"num_deltas": {"layer": -1}}, r"num_deltas\['layer'\] must be a whole number >= 0, got -1"),
            ({"selection_algorithm": "best"}, "selection_algorithm must be one of .* got 'best'"),
            ({"reselection_rate_policy": "step"}, "reselection_rate_policy must be one of .* got 'step'"),
            ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
            ({"selection_accumulation_steps": 20}, r"must be in 1..reselection_steps-1 = 1..19, got 20"),
            ({"selection_accumulation_steps": 0}, "got 0"),
            ({"reselection_steps": 1}, "reselection_steps must be at least 2, got 1"),
            ({"initial_reselection_rate": 1.1}, r"initial_reselection_rate must be in \[0, 1\], got 1.1"),
        ),
    ),
    "sft_row": MethodCase(
        lambda **kw: SftConfig(**{"density": 0.3, "granularity": "row", **kw}),
        sft_groups_formula("row"),
        ops=MATRICES,
        unmerges_exactly=True,
        wide={"dtype": "auto"},
        bad=(
            ({"granularity": "rows"}, "granularity must be one of .* got 'rows'"),
            ({"block_size": 8}, "block_size=8 has no meaning with granularity='row'"),
        ),
    ),
    "sft_column": MethodCase(
        lambda **kw: SftConfig(**{"density": 0.3, "granularity": "column", **kw}),
        sft_groups_formula("column"),
        ops=MATRICES,
        unmerges_exactly=True,
        wide={"dtype": "auto"},
    ),
    "sft_block": MethodCase(
        lambda **kw: SftConfig(**{"num_tunable_weights": 12, "granularity": "block", "block_size": 2, **kw}),
        sft_groups_formula("block"),
        ops=("linear", "linear_no_bias", "Conv1D", "embedding"),
        unmerges_exactly=True,
        wide={"dtype": "auto"},
        bad=(
            ({"block_size": 0}, "block_size must be a positive whole number, got 0"),
            ({"block_size": 2.0}, "got 2.0"),
        ),
    ),
    "ssf": MethodCase(
        lambda **kw: SsfConfig(**kw),
        ssf_formula,
        unmerges_exactly=True,
        bad=(
            ({"bias": "ssf_only"}, "bias must be 'none' or 'all', got 'ssf_only'"),
            ({"init_ssf_weights": "uniform"}, "init_ssf_weights must be True or 'normal', got 'uniform'"),
            ({"init_ssf_weights": False}, "got False"),
        ),
    ),
}  # fmt: skip
EVERY_BAD = (
    ({"target_modules": "lay(er"}, r"target_modules='lay\(er' is not a valid regular expression"),
    ({"exclude_modules": "lay(er"}, r"exclude_modules='lay\(er' is not a valid regular expression"),
    ({"target_modules": "layer", "layers_to_transform": [1]}, "layers_to_transform cannot be combined"),
    ({"target_modules": ["layer"], "layers_pattern": "h"}, "layers_pattern .* needs layers_to_transform"),
    ({"target_modules": ["layer"], "task_type": "CHESS"}, "task_type must be one of .* got 'CHESS'"),
)
