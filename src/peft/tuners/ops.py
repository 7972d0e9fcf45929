"""Ops: what a base layer computes, seen the same way for every kind of layer.

An `Op` knows the sizes of its layer, reads and writes its weight as `W[out, in, *kernel]` (so transposes exist only
here), and computes with any such weight. Methods are written against this view and work on every kind of layer.

Shape letters: O output channels, I input channels, K kernel, N tokens or images.

How `nn.MultiheadAttention` runs with adapters is in `attention.py`.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..utils.placement import (
    OffloadedTensor,
    home_device,
    is_sharded,
    logical_shape,
    offload_hook,
    onloaded,
    overwrite,
    refuse_flattened,
    unhooked,
    whole_tensor,
)
from ..utils.quantization_utils import (
    dequantize,
    is_quantized,
    layer_before,
    packed_state,
    requantize,
    stored_shape,
    stored_weight,
)

MATRIX_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding")  # transformers' Conv1D is a Linear
OP_KINDS = (*MATRIX_KINDS, "Norm")


class Op:
    """The view of one base layer.

    Attributes:
        layer: the module.
        in_features, out_features: channels of its input and output.
        channel_dim: where the output channels stand in the layer's output (-1, or 1 for convolutions).
        is_read: others take the weight from the layer (`layer.weight`) and do not call it.
        lora_gain: by what LoRA multiplies its scaling.
        shared: another module holds the same weight `Parameter`; then `store` gives this layer one of its own.
    """

    kind = "?"
    channel_dim = -1
    transposed = False
    is_read = False
    lora_gain = 1
    weight_name, bias_name = "weight", "bias"

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.shared = False
        self._set_aside: dict[str, nn.Parameter] = {}  # parameters that `store` must leave as they are
        self._offloaded: dict[str, OffloadedTensor] = {}  # what `store` has replaced where it is off-loaded to
        self._was_sharded = False

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight_shape[2:])

    @property
    def weight(self) -> torch.Tensor:
        """The tensor with the numbers of the layer's weight, packed or not."""
        return stored_weight(self.layer)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.layer, self.bias_name, None)

    @property
    def stored_shape(self) -> torch.Size:
        """Shape of the logical weight as the layer stores it (a packed or sharded weight counts all its elements)."""
        return stored_shape(self.layer)

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of `W`, (O, I, *K)."""
        shape = self.stored_shape
        return torch.Size((shape[1], shape[0])) if self.transposed else shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of `W` with all weights of an output channel in one row, (O, I K)."""
        shape = self.weight_shape
        return shape[0], shape[1:].numel()

    def to_view(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight as stored -> `W[O, I, *K]` (and back: it is its own inverse). No copy."""
        return stored.T if self.transposed else stored

    def load(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(W, b)`, whole and on the device where the layer runs; not copies where the layer holds them in the clear.

        A packed weight is dequantised, an off-loaded one is fetched, a sharded one is gathered (by all processes
        together).

        Raises:
            RuntimeError: the weight is not here and cannot be fetched.
        """
        with onloaded(self.layer):
            refuse_flattened(self.layer)
            bias, is_packed = self.bias, is_quantized(self.layer)
            self._was_sharded |= is_sharded(self.weight)
            if is_packed and is_sharded(self.weight):
                raise RuntimeError(
                    f"The weight of {type(self.layer).__name__} is packed and sharded, and cannot be read in parts: "
                    "save the adapter and do this in one process"
                )
            W = dequantize(self.layer) if is_packed else self.weight
            return self.to_view(whole_tensor(W)), None if bias is None else whole_tensor(bias)

    def store(self, W: torch.Tensor, b: torch.Tensor | None) -> None:
        """Write a weight and a bias (None: the layer has none) to where the layer's own are.

        Raises:
            RuntimeError: they are where they cannot be written.
            TypeError: the weight is packed in a way that cannot be made here.
        """
        refuse_flattened(self.layer)
        self._refuse_computed()
        W = self.to_view(W.detach())
        if not is_quantized(self.layer):
            self._write(self.weight_name, W.to(self.weight.dtype).contiguous())
        elif offload_hook(self.layer) is not None:
            raise RuntimeError(
                f"The packed weight of {type(self.layer).__name__} is off-loaded and cannot be rewritten: load the "
                "model without off-loading"
            )
        else:
            requantize(self.layer, W.contiguous())
        self._store_bias(b)

    def keep(self) -> tuple[dict[str, object], torch.Tensor | None] | None:
        """What `put_back` needs to undo a `store` bit for bit, without a copy; None where the weight is not packed."""
        state, bias = packed_state(self.layer), self.bias
        return None if state is None else (state, None if bias is None else bias.detach())

    def put_back(self, kept: tuple[dict[str, object], torch.Tensor | None]) -> None:
        state, bias = kept
        for name, value in state.items():
            setattr(self.layer, name, value)
        self._store_bias(bias)

    def _store_bias(self, b: torch.Tensor | None) -> None:
        is_offloaded = offload_hook(self.layer) is not None
        bias, name = self.bias, self.bias_name
        if b is None:
            if bias is not None:
                setattr(self.layer, name, None)
            if name in self._offloaded:
                self._offloaded.pop(name).restore()
        elif bias is None:
            b = b.detach().to(self._bias_dtype(b), copy=True)
            here = torch.empty_like(b, device="meta") if is_offloaded else b
            setattr(self.layer, name, nn.Parameter(here, requires_grad=False))
            if is_offloaded:
                self._write(name, b)
        elif b is not bias:
            self._write(name, b.detach().to(bias.dtype))

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A layer that computes the same as this packed one, with its weight in the clear; None: in the type it has."""
        W, b = self.load()
        dtype = dtype or W.dtype
        layer = layer_before(self.layer)
        if layer is None:
            with torch.device("meta"):
                layer = self._empty(bias=b is not None)
        layer.weight = nn.Parameter(self.to_view(W).to(dtype), requires_grad=False)
        if b is not None:
            layer.bias = nn.Parameter(b.detach().to(dtype), requires_grad=False)
        return layer.train(self.layer.training)

    def _empty(self, bias: bool) -> nn.Module:
        """What `plain` fills."""
        raise TypeError(f"{type(self.layer).__name__} cannot be replaced by a layer with a plain weight")

    def _refuse_computed(self) -> None:
        layer, name = self.layer, type(self.layer).__name__
        if self._was_sharded and not is_sharded(self.weight):
            raise RuntimeError(
                f"The weight of {name} is sharded, and what is written into its gathered form would be lost: call "
                "reshard() on the FSDP modules first"
            )
        if self.weight_name not in layer._parameters and not is_quantized(layer):
            raise RuntimeError(
                f"The weight of {name} is computed from other parameters (a parametrisation, weight norm) and would be "
                "so again after merging: make it a plain parameter first (remove_parametrizations, remove_weight_norm)"
            )

    def _write(self, name: str, value: torch.Tensor) -> None:
        """Give the parameter `name` other numbers, wherever they are kept."""
        parameter = getattr(self.layer, name)
        apart = self.shared and name != self.bias_name  # who shares the weight must not see the change
        if offload_hook(self.layer) is not None:
            if name not in self._offloaded:
                self._offloaded[name] = OffloadedTensor(self.layer, name)
            self._offloaded[name].write(value)
        elif is_sharded(parameter):
            if apart:
                raise RuntimeError(
                    f"The weight of {type(self.layer).__name__} is tied to another module's and sharded, so it cannot "
                    "be changed in one place only: leave it out of target_modules, or merge in one process"
                )
            overwrite(parameter, value)
        elif (apart or parameter.is_inference()) and name not in self._set_aside:
            self._set_aside[name] = parameter
            setattr(self.layer, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        else:
            parameter.data = value

    def _bias_dtype(self, b: torch.Tensor) -> torch.dtype:
        return self.weight.dtype if self.weight.is_floating_point() else b.dtype

    @property
    def is_parted(self) -> bool:
        """Whether `store`, if it has written, had to part the layer's weight from the module that shares it."""
        offloaded = self._offloaded.get(self.weight_name)
        return self.shared or (offloaded is not None and offloaded.tied)

    def retie(self) -> None:
        """Put back what `store` had to replace: a weight that is shared, entries of off-loaded weights."""
        while self._set_aside:
            setattr(self.layer, *self._set_aside.popitem())
        while self._offloaded:
            self._offloaded.popitem()[1].restore()

    def op(self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """The layer's function with another weight; `x` is what the layer takes."""
        raise NotImplementedError

    def channels(self, v: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A vector (O,) shaped to multiply the output `y` channel by channel."""
        return v if self.channel_dim == -1 else v.view(-1, *([1] * len(self.kernel)))

    def scale_channels(self, W: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight of the layer whose output, without the bias, is `scale` (O,) times as large."""
        return W * scale.view(-1, *([1] * (W.dim() - 1)))

    def scale_inputs(self, W: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight of the layer that multiplies its input channels by `scale` (I,)."""
        return W * scale.view(1, -1, *([1] * (W.dim() - 2)))

    def add_shift(self, W: torch.Tensor, b: torch.Tensor | None, shift: torch.Tensor):
        """`(W, b)` of the layer whose output is `shift` (O,) higher.

        Raises:
            TypeError: the layer has no place for a shift.
        """
        return W, shift if b is None else b + shift


class LinearOp(Op):
    kind = "Linear"

    def op(self, x, W, b):
        return F.linear(x, W, b)

    def _empty(self, bias):
        return nn.Linear(self.in_features, self.out_features, bias)

    # The product and its derivatives one by one, as an autograd function needs them; ConvOp has the same.

    groups = 1

    def framed(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def product(self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return linear(x, W, b)

    def input_gradient(self, gy: torch.Tensor, shape: torch.Size, W: torch.Tensor) -> torch.Tensor:
        return gy @ W

    def by_channel(self, t: torch.Tensor) -> torch.Tensor:
        return t.reshape(-1, t.shape[-1])

    def weight_gradient(
        self, gy: torch.Tensor, x: torch.Tensor, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        return gy[:, start:stop].T @ x


class ParameterOp(Op):
    """The view of one parameter of a module, in the shape in which it is stored."""

    kind = "Parameter"
    bias_name = ""

    def __init__(self, layer: nn.Module, name: str):
        super().__init__(layer)
        self.weight_name = name

    @property
    def weight(self):
        return getattr(self.layer, self.weight_name)

    @property
    def stored_shape(self):
        return logical_shape(self.weight)


class InProjectionOp(ParameterOp, LinearOp):
    """The packed in-projection of `nn.MultiheadAttention`, (3 E, E): query, key and value below each other."""

    kind = "Linear"
    is_read = True
    bias_name = "in_proj_bias"

    def __init__(self, layer):
        super().__init__(layer, "in_proj_weight")


class OutProjectionOp(LinearOp):
    """The out-projection of `nn.MultiheadAttention`.

    Its LoRA counts twice: upstream adds its change twice, always, so that adapters from there were trained to that.
    """

    is_read = True
    lora_gain = 2


class Conv1DOp(LinearOp):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (I, O)."""

    transposed = True


class ConvOp(Op):
    """A convolution. Its weight is (O, I / G, *K): every one of G groups of channels sees its own part of the input."""

    channel_dim = 1

    @property
    def kind(self) -> str:
        return f"Conv{len(self.kernel)}d"

    @property
    def in_features(self) -> int:
        return self.layer.in_channels

    @property
    def groups(self) -> int:
        return self.layer.groups

    def op(self, x, W, b):
        return self.layer._conv_forward(x, W, b)

    def scale_inputs(self, W, scale):
        # The outputs (O / G) of each group see channels of their own (I / G).
        W = W.unflatten(0, (self.groups, -1))
        return (W * scale.view(self.groups, 1, -1, *([1] * len(self.kernel)))).flatten(0, 1)

    def _empty(self, bias):
        old = self.layer
        return getattr(nn, self.kind)(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
            bias, old.padding_mode,
        )  # fmt: skip

    @property
    def _pads(self) -> bool:
        """Whether the convolution itself pads, with zeros; else `framed` has to."""
        return self.layer.padding_mode == "zeros" and not isinstance(self.layer.padding, str)

    @property
    def _geometry(self) -> tuple:
        layer, none = self.layer, (0,) * len(self.kernel)
        return layer.stride, layer.padding if self._pads else none, layer.dilation, False, none

    def framed(self, x: torch.Tensor) -> torch.Tensor:
        """The input (N, C, *S), or (C, *S), as `product` takes it: with N, and padded where it does not pad."""
        x = x if x.dim() == 2 + len(self.kernel) else x.unsqueeze(0)
        if self._pads:
            return x
        mode = self.layer.padding_mode
        return F.pad(x, self.layer._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)

    def product(self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """`op` for a framed input, in memory of its own; (N, O, *L)."""
        return torch.convolution(x, W, b, *self._geometry, self.groups)

    def input_gradient(self, gy: torch.Tensor, shape: torch.Size, W: torch.Tensor) -> torch.Tensor:
        """The gradient of the framed input, of this shape, from that of the output (N, O, *L)."""
        x = gy.new_empty(1).expand(shape)
        return _convolution_backward(gy, x, W, None, *self._geometry, self.groups, (True, False, False))[0]

    def by_channel(self, t: torch.Tensor) -> torch.Tensor:
        """Input or output as `weight_gradient` takes it: channels in dimension 1."""
        return t

    def weight_gradient(
        self, gy: torch.Tensor, x: torch.Tensor, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows `start` to `stop` of the weight's gradient, (stop - start, I / G, *K).

        Args:
            gy: (N, O, *L) gradient of the output; some channels of it if G = 1.
            x: (N, I, *S) the framed input, or some channels of it, equally many of each group.
        """
        stop = gy.shape[1] if stop is None else stop
        outputs, inputs = gy.shape[1] // self.groups, x.shape[1] // self.groups
        parts = []
        while start < stop:  # whole groups together, parts of one each for itself
            group, within = divmod(start, outputs)
            whole = 0 if within else (stop - start) // outputs
            count = whole * outputs or min(outputs - within, stop - start)
            groups = whole or 1
            weight = gy.new_empty(1).expand(count, inputs, *self.kernel)
            some = gy[:, start : start + count], x[:, group * inputs : (group + groups) * inputs]
            mask = (False, True, False)
            parts.append(_convolution_backward(*some, weight, None, *self._geometry, groups, mask)[1])
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else gy.new_empty(0, inputs, *self.kernel)

    def windows(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """What each weight is multiplied with, (I, *K, N, *L): a view of the input, or of a padded copy.

        Args:
            x: (N, I, *S), framed.
            size: of the output, L.
        """
        strides, padding, dilations, *_ = self._geometry
        x = F.pad(x, [n for p in reversed(padding) for n in (p, p)]) if any(padding) else x
        batch, channel, *steps = x.stride()
        taps = [step * dilation for step, dilation in zip(steps, dilations)]
        moves = [step * stride for step, stride in zip(steps, strides)]
        return x.as_strided((x.shape[1], *self.kernel, len(x), *size), (channel, *taps, batch, *moves))


class EmbeddingOp(Op):
    """`W[O, I]` is the transposed table: I tokens, O the width."""

    kind = "Embedding"
    transposed = True

    def op(self, x, W, b, *args, **kwargs):
        if self.own_forward is not None:
            with unhooked(self.own_forward):
                return torch.func.functional_call(self.own_forward, {"weight": W.T}, (x, *args), kwargs)
        return self._lookup(x, W.T, self.layer.padding_idx)

    def _lookup(self, x: torch.Tensor, table: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        layer = self.layer
        # Not with `layer.sparse`: the table comes out of an adapter, and through that no sparse gradient can go.
        y = F.embedding(x, table, padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)
        return self.scaled(y)

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        """Rows of a table, or of a change of it, as the layer gives them out."""
        scale = self.embed_scale
        return y if scale is None else y * scale.to(y)

    def _empty(self, bias):
        old = self.layer
        if self.embed_scale is not None:
            return super()._empty(bias)
        return nn.Embedding(
            old.num_embeddings, old.embedding_dim, old.padding_idx, old.max_norm, old.norm_type, old.scale_grad_by_freq
        )

    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """The vectors (U, O) of some tokens (U,), a copy."""
        return F.embedding(tokens, self.load()[0].T)

    def op_on(self, x: torch.Tensor, tokens: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """`op` with a table of which only some rows are given.

        Args:
            x: places in `tokens`.
            tokens: (U,) distinct.
            vectors: (U, O).
        """
        if self.layer.padding_idx is not None:  # this row is used, but has no gradient
            vectors = torch.where((tokens == self.layer.padding_idx)[:, None], vectors.detach(), vectors)
        return self._lookup(x, vectors, None)

    def add_shift(self, W, b, shift):
        # A table has no bias, but every row can carry the shift.
        scale = self.embed_scale
        return W + (shift if scale is None else shift / scale.to(shift)).unsqueeze(1), b

    @property
    def embed_scale(self) -> torch.Tensor | None:
        """The factor that some embeddings (Gemma's) multiply their rows by; deltas of the table are scaled too."""
        scale = getattr(self.layer, "embed_scale", None)
        return scale if scale is None or torch.is_tensor(scale) else torch.tensor(scale)

    @property
    def own_forward(self) -> nn.Module | None:
        """The layer if it does more than to look up its input (OPT's positions); its forward then has to be called."""
        layer = layer_before(self.layer)  # packed ones look up in a way of their own, which counts for nothing
        own = layer is not None and type(layer).forward is not nn.Embedding.forward and self.embed_scale is None
        return layer if own else None


class NormOp(Op):
    """LayerNorm, GroupNorm and RMSNorm-like layers: `W` is (O,), normalisation first, then `W` and `b` per channel."""

    kind = "Norm"

    @functools.cached_property
    def channel_dim(self) -> int:
        """Where the channels stand; a norm that no probe tells it of has them last, as most have."""
        if type(self.layer).forward is nn.GroupNorm.forward:
            return 1
        if type(self.layer).forward is nn.LayerNorm.forward:
            return -1
        return -1 if self._probe is None else self._probe[0]

    @property
    def in_features(self) -> int:
        return self.weight_shape[0]

    @functools.cached_property
    def _offset(self) -> float:
        """1 for norms that multiply by 1 + weight (Gemma's), else 0: a zero weight then does not give zero."""
        if type(self.layer).forward in (nn.LayerNorm.forward, nn.GroupNorm.forward):
            return 0.0
        if self._probe is None:
            raise TypeError(
                f"{type(self.layer).__name__} cannot be run on a tensor alone, so that how its weight enters is not "
                "known: unload without merging, or leave the norms out of the adapter's targets"
            )
        return 1.0 if self._probe[1] else 0.0

    @functools.cached_property
    def _probe(self) -> tuple[int, torch.Tensor] | None:
        """`(channel_dim, any number)` of what the layer, its parameters 0, makes of the first input that it takes."""
        layer, device, channels = self.layer, home_device(self.layer), self.out_features
        ours = {
            name: torch.zeros(logical_shape(p), dtype=p.dtype, device=device) for name, p in layer.named_parameters()
        }
        ours |= {name: buffer.clone() for name, buffer in layer.named_buffers()}  # statistics stay as they are
        s, t = [size for size in (2, 3, 5) if size != channels][:2]
        for shape in ((1, s, t, channels), (1, channels, s, t), (1, s, channels), (1, channels, s), (1, channels)):
            x = torch.linspace(1, 2, math.prod(shape), device=device, dtype=layer.weight.dtype).view(shape)
            try:
                with unhooked(layer):
                    y = torch.func.functional_call(layer, ours, (x,))
            except Exception:  # whatever a foreign norm says of an input that it does not take
                continue
            if isinstance(y, torch.Tensor) and y.shape == x.shape:
                return (-1 if shape[-1] == channels else 1), y.any()
        return None

    def op(self, x, W, b):
        layer = self.layer
        ours = {"weight": W.to(layer.weight.dtype)}
        has_bias = getattr(layer, "bias", None) is not None
        if b is not None and has_bias:
            ours["bias"] = b
        with unhooked(layer):
            y = torch.func.functional_call(layer, ours, (x,))
        return y if b is None or has_bias else y + self.channels(b, y)

    def channels(self, v, y):
        return v if self.channel_dim == -1 else v.view(-1, *([1] * (y.dim() - 2)))

    def scale_channels(self, W, scale):
        # scale (W + offset) - offset, in a form that is exactly W for a scale of 1
        return W * scale + self._offset * (scale - 1)

    def add_shift(self, W, b, shift):
        has_place = isinstance(self.layer, (nn.LayerNorm, nn.GroupNorm)) or self.bias is not None
        if not has_place and shift.any():
            raise TypeError(
                f"{type(self.layer).__name__} has no bias, so a shift cannot be merged into it: unload without "
                "merging, or leave the norms out of the adapter's targets"
            )
        return super().add_shift(W, b, shift)


class BlockOp(Op):
    """The view of a module that holds layers, and has no weight of its own: its sizes."""

    kind = "Block"

    @functools.cached_property
    def _ops(self) -> list[Op]:
        return [op for part in self.layer.modules() if (op := make_op(part)) is not None]

    @property
    def in_features(self) -> int:
        return self._ops[0].in_features

    @property
    def out_features(self) -> int:
        return self._ops[-1].out_features

    @property
    def weight(self) -> torch.Tensor:
        """Any of its parameters in floating point, for its type; all may be packed."""
        return next((p for p in self.layer.parameters() if p.is_floating_point()), torch.empty(0))


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _is_norm(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or len(logical_shape(weight)) != 1 or isinstance(layer, nn.SyncBatchNorm):
        return False
    return isinstance(layer, (nn.LayerNorm, nn.GroupNorm)) or type(layer).__name__.endswith("Norm")


def make_op(layer: nn.Module) -> Op | None:
    """The `Op` of a layer, or None where there is none for its kind."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return OutProjectionOp(layer)
    if isinstance(layer, nn.Linear):
        return LinearOp(layer)
    if isinstance(layer, nn.MultiheadAttention):
        return InProjectionOp(layer) if layer._qkv_same_embed_dim else None
    if _is_conv1d(layer):
        return Conv1DOp(layer)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvOp(layer)
    if isinstance(layer, nn.Embedding):
        return EmbeddingOp(layer)
    if _is_norm(layer):
        return NormOp(layer)
    if is_quantized(layer):
        return LinearOp(layer)
    return None


def linear(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b`, (..., I) -> (..., O), in memory of its own.

    What a custom autograd function returns as a view, as F.linear's result can be, cannot be changed in place; and the
    next layer may do that (nn.ReLU(inplace=True), Falcon's MLP).
    """
    if torch.compiler.is_compiling():
        return F.linear(x, W, b)
    y = x.new_empty(*x.shape[:-1], len(W))
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, len(W))
    torch.mm(rows, W.T, out=out) if b is None else torch.addmm(b, rows, W.T, out=out)
    return y


_convolution_backward = torch.ops.aten.convolution_backward
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


_LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain(module: nn.Module, types: tuple[type, ...] = _LINEAR) -> bool:
    """Whether calling `module` (of one of `types`, or Conv1D) is its product and nothing else, seen by nobody.

    Not plain: subclasses (FSDP, parametrisations, quantised), hooks (off-loading, ZeRO-3, the user's), a replaced
    `forward` (accelerate), tensor subclasses as weights (DTensor).
    """
    if not (type(module) in types or _is_conv1d(module)) or "forward" in module.__dict__:
        return False
    if any(getattr(module, name) for name in _HOOKS):
        return False
    return type(module.weight) in (nn.Parameter, torch.Tensor, FakeTensor)  # fake ones stand for plain ones


def no_global_hooks() -> bool:
    """Whether nothing wants to see the calls of all modules: no hook for all of them, no transform of torch.func.

    Transforms (grad, vmap, jvp) see through modules and torch's operations, but not through autograd functions like
    ours.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    return not any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
