"""Packed linear layers for the tests: made by the libraries that run here, or stand-ins with others' attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def four_bit(quant_type: str, nested: bool = False, dtype: torch.dtype = torch.float32):
    def pack(linear: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type,
        )  # fmt: skip
        layer.load_state_dict(linear.state_dict())
        return layer.to(dtype).to("cpu")

    return pack


def eight_bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def hqq(bits: int, axis: int = 1):
    def pack(linear: nn.Linear) -> nn.Module:
        quantize = pytest.importorskip("hqq.core.quantize")
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
        return quantize.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")

    return pack


def torchao(granularity: str):
    def pack(linear: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        sizes = {"PerGroup": (32,)}.get(granularity, ())
        how = getattr(quantization, granularity)(*sizes)
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(granularity=how))
        return linear

    return pack


def quanto(kind: str):
    def pack(linear: nn.Linear) -> nn.Module:
        library = pytest.importorskip("optimum.quanto")
        holder = nn.Sequential(linear)
        library.quantize(holder, weights=getattr(library, kind))
        library.freeze(holder)
        return holder[0]

    return pack


def blockwise(linear: nn.Linear) -> nn.Module:
    from peft.utils.blockwise import quantize_

    quantize_({"linear": linear})
    return linear


class StandIn(nn.Module):
    """A linear layer of whole numbers and one scale per output channel, under the names that a library gives them."""

    def __init__(self, linear: nn.Linear, numbers: str, scales: str, *others: str, transposed: bool = False):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 7
        levels = (weight / scale).round().to(torch.int8)
        self.names, self.transposed = (numbers, scales), transposed
        self.register_buffer(numbers, levels.T.contiguous() if transposed else levels)
        self.register_buffer(scales, scale.flatten())
        for name in others:
            self.register_buffer(name, torch.zeros(1, dtype=torch.int32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        if not transposed:
            self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        levels, scale = (getattr(self, name) for name in self.names)
        weight = (levels.T if self.transposed else levels) * scale[:, None]
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class FP8Linear(nn.Linear):
    """As transformers' layer of this name, with one scale."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().max() / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


@dataclass
class Base:
    """A way to pack a linear layer."""

    name: str  # of the backend
    pack: Callable[[nn.Linear], nn.Module]
    error: float = 0.0  # of packing normally distributed weights, at most; 0: cannot be packed again
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5


BASES: dict[str, Base] = {
    "nf4": Base("bitsandbytes 4-bit", four_bit("nf4"), 0.2),
    "nf4 nested": Base("bitsandbytes 4-bit", four_bit("nf4", nested=True), 0.2),
    "nf4 bfloat16": Base("bitsandbytes 4-bit", four_bit("nf4", dtype=torch.bfloat16), 0.2, torch.bfloat16, 2e-2),
    "nf4 float16": Base(
        "bitsandbytes 4-bit", four_bit("nf4", nested=True, dtype=torch.float16), 0.2, torch.float16, 5e-3
    ),
    "fp4": Base("bitsandbytes 4-bit", four_bit("fp4"), 0.25),
    "int8": Base("bitsandbytes 8-bit", eight_bit, 0.01),
    "hqq 4 bits": Base("HQQ", hqq(4), 0.2),
    "hqq 8 bits": Base("HQQ", hqq(8, axis=0), 0.01),
    "torchao rows": Base("torchao int8", torchao("PerRow"), 0.01),
    "torchao groups": Base("torchao int8", torchao("PerGroup"), 0.01),
    "quanto 8 bits": Base("quanto", quanto("qint8"), 0.01),
    "quanto 4 bits": Base("quanto", quanto("qint4"), 0.2),
    "block-wise": Base("block-wise 8-bit", blockwise, 0.03),
    "GPTQ": Base("GPTQ", lambda linear: StandIn(linear, "qweight", "scales", "qzeros", "g_idx")),
    "AWQ": Base("AWQ", lambda linear: StandIn(linear, "qweight", "scales", "qzeros")),
    "AQLM": Base("AQLM", lambda linear: StandIn(linear, "codes", "scales", "codebooks")),
    "EETQ": Base("EETQ", lambda linear: StandIn(linear, "weight", "weight_scales", transposed=True)),
    "FP8": Base("FP8", FP8Linear),
    "unknown": Base("packed", lambda linear: StandIn(linear, "weight", "scaling")),
}
REWRITABLE = [name for name, base in BASES.items() if base.error]
READ_ONLY = [name for name, base in BASES.items() if not base.error]
WIDTH = 64  # one block of 4 bits: on CPUs bitsandbytes 0.50.2 reads most rows that are no whole number of them wrongly


class Net(nn.Module):
    """Two packed layers, of which the tests adapt the first or both; weights are normally distributed."""

    def __init__(self, base: str, bias: bool = True):
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, bias=bias and i == 0) for i in range(2)]
        for parameter in (p for layer in layers for p in layer.parameters()):
            nn.init.normal_(parameter, std=WIDTH**-0.5)
        self.first, self.second = (BASES[base].pack(layer.to(BASES[base].dtype)) for layer in layers)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def weight_of(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a packed layer computes with, from its outputs alone."""
    layer = getattr(layer, "base_layer", layer)
    bias, layer.bias = layer.bias, None  # adding it would round
    weight = layer(torch.eye(WIDTH, dtype=dtype)).detach().double().T
    layer.bias = bias
    return weight
