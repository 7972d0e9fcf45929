"""Linear layers and embeddings whose weights are kept in 8 bits, block by block, as `finetuna` uses them.

The storage is bitsandbytes' dynamic 8-bit type (arXiv 2110.02861, section 2.1): 4096 consecutive weights share one
scale, their largest magnitude. Products dequantise one layer at a time, in the backward pass once more, so that
autograd never keeps a dequantised weight; embeddings dequantise the rows that are looked up.

Left out: off-loaded and sharded weights, and what has to see a weight while it is trained (`max_norm`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..tuners.ops import _is_conv1d, linear
from .autocast import no_autocast
from .placement import is_sharded
from .quantization_utils import QuantizationBackend, register_backend

BLOCK = 4096  # weights that share a scale; bitsandbytes' default
CHUNK = 1024 * BLOCK  # weights that are quantised at once
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _codes(device: torch.device) -> torch.Tensor:
    """The 256 values of the 8-bit type, in -1..1."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as `(packed, absmax)`: int8 of the same shape, and the float32 scale of each block.

    The packed bytes are codes without a sign; int8 is what models look for that treat 8-bit layers apart (T5).

    Raises:
        ValueError: values that are not finite.
    """
    from bitsandbytes.functional import quantize_blockwise

    flat = weight.detach().reshape(-1)
    packed = torch.empty_like(flat, dtype=torch.uint8)
    absmax = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, len(flat), CHUNK):
        chunk = flat[start : start + CHUNK]
        if not chunk.isfinite().all():
            raise ValueError("A weight with values that are not finite cannot be quantised")
        packed[start : start + CHUNK], state = quantize_blockwise(
            chunk if chunk.dtype in _KERNEL_DTYPES else chunk.float(), _codes(flat.device), blocksize=BLOCK
        )
        absmax[start // BLOCK : (start + CHUNK) // BLOCK] = state.absmax
    return packed.view(torch.int8).view(weight.shape), absmax


def unpack(packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack`, in floating point."""
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    kernel_dtype = dtype if dtype in _KERNEL_DTYPES else torch.float32
    state = QuantState(absmax, code=_codes(packed.device), blocksize=BLOCK, dtype=kernel_dtype)
    return dequantize_blockwise(packed.view(torch.uint8), state).to(dtype)


class _PackedProduct(torch.autograd.Function):
    """`apply(x, packed, absmax, bias, transposed)`: `x W^T + b`, (..., I) -> (..., O), W dequantised in each pass."""

    @staticmethod
    def forward(ctx, x, packed, absmax, bias, transposed):
        ctx.save_for_backward(packed, absmax)
        ctx.transposed = transposed
        W = unpack(packed, absmax, x.dtype)
        return linear(x, W.T if transposed else W, bias)

    @staticmethod
    def backward(ctx, gy):
        gx = gb = None
        if ctx.needs_input_grad[0]:
            W = unpack(*ctx.saved_tensors, gy.dtype)
            with no_autocast(gy.device.type):
                gx = gy @ (W.T if ctx.transposed else W)
        if ctx.needs_input_grad[3]:
            gb = gy.reshape(-1, gy.shape[-1]).sum(0)
        return gx, None, None, gb, None


class Blockwise(nn.Module):
    """What the packed layers share.

    Attributes:
        weight: packed, int8, of the shape in which the layer stored it.
        absmax: float32, the scale of each block of the flattened weight.
        dtype: what the weight was, or was cast to, and what an embedding gives.
        transposed: whether the weight of a linear layer is stored (I, O), as GPT-2's are.
        plain: for embeddings of a class of their own (OPT's positions, Gemma's table): the layer without its table.
    """

    absmax: torch.Tensor
    dtype: torch.dtype
    transposed: bool
    plain: nn.Module | None

    def hold(self, packed: nn.Parameter, absmax: torch.Tensor) -> None:
        """Take over packed weights. Who shared the layer's former ones keeps those."""
        self.weight = packed
        self.register_buffer("absmax", absmax)

    def holds(self, packed: torch.Tensor, absmax: torch.Tensor) -> bool:
        """Whether these are the layer's numbers, in the same place."""
        same_place = self.weight.device == packed.device and self.weight.shape == packed.shape
        return same_place and torch.equal(self.weight, packed) and torch.equal(self.absmax, absmax)

    def dequantized(self) -> torch.Tensor:
        """The weight, (O, I) of a linear layer."""
        weight = unpack(self.weight, self.absmax, self.dtype)
        return weight.T if self.transposed else weight

    def _apply(self, fn, recurse=True):
        """Moves go for everything; casts change `dtype` and not the scales, which are part of the packed weight."""
        absmax = self.absmax
        super()._apply(fn, recurse)
        if self.absmax.dtype != absmax.dtype:
            self.absmax = absmax.to(self.absmax.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=absmax.device)).dtype
        return self


class BlockwiseLinear(Blockwise, nn.Linear):
    """A frozen `nn.Linear` (or transformers' `Conv1D`) in 8 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        x = x.to(torch.get_autocast_dtype(device)) if autocast else x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _PackedProduct.apply(x, self.weight, self.absmax, bias, self.transposed)


class BlockwiseEmbedding(Blockwise, nn.Embedding):
    """A frozen `nn.Embedding` in 8 bits."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        scale = getattr(self, "embed_scale", None)
        if self.plain is not None and scale is None:
            return torch.func.functional_call(self.plain, {"weight": self.dequantized()}, (x, *args), kwargs)
        codes = F.embedding(x, self.weight).view(torch.uint8).int()  # (..., I)
        width = self.embedding_dim
        places = x.long().unsqueeze(-1) * width + torch.arange(width, device=x.device)
        y = (_codes(x.device)[codes] * self.absmax[places // BLOCK]).to(self.dtype)
        return y if scale is None else y * (scale.to(y.dtype) if torch.is_tensor(scale) else scale)


def check_quantizable(key: str, layer: nn.Module) -> None:
    """Refuse a layer that cannot be packed.

    Raises:
        ValueError: so it is; the message says why, and what to do.
    """
    weight = layer._parameters.get("weight")
    problem = None
    if weight is None:
        problem = "its weight is computed from other parameters: make it a plain parameter first"
    elif weight.is_meta or is_sharded(weight):
        problem = "its weight is not here (empty, off-loaded or sharded): load the whole model first"
    elif "forward" in vars(layer):
        problem = "its forward was replaced (by accelerate's hooks?): quantise before dispatching the model"
    elif getattr(layer, "max_norm", None) is not None:
        problem = f"max_norm={layer.max_norm} rewrites its weight as it runs"
    if problem:
        raise ValueError(f"{key} cannot be quantised: {problem}; or name it in modules_not_to_quantize")


def quantize_(layers: Mapping[str, nn.Module], twins: Mapping[str, Iterable[Blockwise]] | None = None) -> None:
    """Turn linear layers, Conv1D and embeddings into packed ones, in place; a weight that several share is packed once.

    The modules stay the same objects: hooks on them, and references to them, go on to hold.

    Args:
        layers: by name.
        twins: name -> packed layers of other models; the first that holds the same numbers shares its memory.

    Raises:
        ValueError: a layer cannot be packed; then none is, unless it is for its numbers.
    """
    groups: dict[int, list[str]] = {}
    for key, layer in layers.items():
        check_quantizable(key, layer)
        groups.setdefault(id(layer.weight), []).append(key)
    for keys in groups.values():
        packed, absmax = pack(layers[keys[0]].weight)
        others = (twin for key in keys for twin in (twins or {}).get(key, ()))
        twin = next((twin for twin in others if twin.holds(packed, absmax)), None)
        if twin is not None:
            packed, absmax = twin.weight.detach(), twin.absmax
        packed = nn.Parameter(packed, requires_grad=False)  # one for all: what was tied stays so
        for key in keys:
            _convert(layers[key], packed, absmax)


def _convert(layer: nn.Module, packed: nn.Parameter, absmax: torch.Tensor) -> None:
    layer.dtype = layer.weight.dtype
    layer.transposed = _is_conv1d(layer)
    layer.requires_grad_(False)
    if isinstance(layer, nn.Embedding):
        is_own = type(layer).forward is not nn.Embedding.forward
        vars(layer)["plain"] = _without_table(layer) if is_own else None  # not in the module tree: it has no numbers
        layer.__class__ = BlockwiseEmbedding
    else:
        if layer.transposed:
            layer.in_features, layer.out_features = layer.weight.shape
        layer.__class__ = BlockwiseLinear
    layer.hold(packed, absmax)


def _without_table(layer: nn.Embedding) -> nn.Embedding:
    plain = object.__new__(type(layer))
    vars(plain).update({**vars(layer), "_parameters": {"weight": None}})
    return plain


def is_product(layer: nn.Module) -> bool:
    """Whether calling the layer gives `x W^T + b`: nn.Linear and Conv1D do, of their subclasses (routers) not all.

    Not the projections of nn.MultiheadAttention either, whose weights torch reads past their forward.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if _is_conv1d(layer) or not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return _is_conv1d(layer) or isinstance(layer, nn.Linear)
    weight = layer.weight
    x = torch.linspace(-1, 1, weight.shape[-1], dtype=weight.dtype, device=weight.device).unsqueeze(0)
    try:
        with torch.no_grad():
            y = layer(x)
    except (RuntimeError, TypeError):  # it takes something else
        return False
    return torch.is_tensor(y) and torch.allclose(y, F.linear(x, weight, layer.bias), rtol=1e-2, atol=1e-3)


def _requantize(layer: Blockwise, weight: torch.Tensor) -> None:
    packed, absmax = pack(weight.T if layer.transposed else weight)
    layer.hold(nn.Parameter(packed, requires_grad=False), absmax)


def _plain(layer: Blockwise) -> nn.Module | None:
    if getattr(layer, "plain", None) is None:
        return None
    plain = _without_table(layer.plain)
    plain._buffers = {name: tensor for name, tensor in layer._buffers.items() if name != "absmax"}
    return plain


register_backend(
    QuantizationBackend(
        "block-wise 8-bit",
        lambda layer: isinstance(layer, Blockwise),
        Blockwise.dequantized,
        _requantize,
        ("weight", "absmax"),
        casts_input=True,
        plain=_plain,
    )
)
