"""Quantised storage: one registry of how to read and write the packed weight of a layer.

A backend says which layers are its own (`match`), reads their weight (`dequantize(layer) -> weight as stored`) and,
where the packed form can be made anew here, writes it (`requantize(layer, weight)`). Methods never see a backend: they
go through `tuners.ops`. Others register theirs with `register_backend`.

Libraries are imported only where one of their layers is read or written. What is known of those that do not run
everywhere (GPTQ, AWQ, EETQ, AQLM, FP8) are the names of their layers' attributes; their weight is read through the
layer's own forward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .._lazy import explain_missing
from .placement import logical_shape


def shape_of(layer: nn.Module) -> torch.Size:
    """The shape of the weight that a linear or embedding layer stands for, as torch's own layer would store it.

    Raises:
        TypeError: the layer does not say its sizes.
    """
    for sizes in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if all(hasattr(layer, size) for size in sizes):
            return torch.Size(getattr(layer, size) for size in sizes)
    raise TypeError(
        f"{type(layer).__name__} holds a packed weight and has neither in_features and out_features nor num_embeddings "
        "and embedding_dim, so its shape is unknown: leave it out of target_modules"
    )


@dataclass(frozen=True)
class QuantizationBackend:
    """How one library stores weights."""

    name: str
    """What users call it."""
    match: Callable[[nn.Module], bool]
    """Whether a layer is packed in this way."""
    dequantize: Callable[[nn.Module], torch.Tensor]
    """The weight in floating point, in the type in which the layer computes."""
    requantize: Callable[[nn.Module, torch.Tensor], None] | None = None
    """Pack a weight like the layer's own; None: it cannot be made here. It gives the layer's `attributes` new values
    and changes nothing in the old ones: these are put back on unmerging, and other layers may hold them."""
    attributes: tuple[str, ...] = ("weight",)
    """Where the layer keeps what is packed, the tensor with the numbers first."""
    shape: Callable[[nn.Module], torch.Size] = shape_of
    """The shape of what `dequantize` gives."""
    plain: Callable[[nn.Module], nn.Module | None] = lambda layer: None
    """The layer as it was before packing, without its weight; None: one of torch's own."""
    casts_input: bool = False
    """Whether the layer takes inputs of any floating-point type, as a model mixes them whose norms are widened."""


_BACKENDS: list[QuantizationBackend] = []
_TORCH_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


def register_backend(backend: QuantizationBackend) -> None:
    """Add a backend; the latest registered is asked first."""
    _BACKENDS.insert(0, backend)


def find_backend(layer: nn.Module) -> QuantizationBackend | None:
    """The backend of a layer; None for a layer that holds its weight in the clear."""
    if type(layer) in _TORCH_LAYERS and type(weight := _held(layer)) is nn.Parameter and _in_the_clear(weight):
        return None  # asked in every forward pass
    if not (layer._parameters or layer._buffers) and type(layer).__module__.startswith("torch.nn."):
        return None  # containers and activations: most modules of a model with adapters
    return next((backend for backend in _BACKENDS if backend.match(layer)), None)


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is packed."""
    return find_backend(layer) is not None


def dequantize(layer: nn.Module) -> torch.Tensor:
    """The weight of `layer` as stored, floating point; the parameter itself where it is not packed."""
    backend = find_backend(layer)
    if backend is None:
        return layer.weight
    with torch.no_grad():
        return backend.dequantize(layer).detach()


def requantize(layer: nn.Module, weight: torch.Tensor) -> None:
    """Pack `weight` into `layer`.

    Raises:
        TypeError: the backend cannot rewrite a packed weight.
    """
    backend = find_backend(layer)
    if backend is None or backend.requantize is None:
        name = type(layer).__name__ if backend is None else backend.name
        raise TypeError(
            f"{name} weights cannot be rewritten here: merge_and_unload(dequantize=True) gives a merged model with "
            "plain weights"
        )
    backend.requantize(layer, weight)


def stored_weight(layer: nn.Module) -> torch.Tensor:
    """The tensor with the numbers of the layer's weight, packed or not, whatever the layer calls it."""
    backend = find_backend(layer)
    return getattr(layer, "weight" if backend is None else backend.attributes[0])


def stored_shape(layer: nn.Module) -> torch.Size:
    """The shape of the layer's weight as stored; a packed or sharded one counts all its elements."""
    backend = find_backend(layer)
    return logical_shape(layer.weight) if backend is None else backend.shape(layer)


def layer_before(layer: nn.Module) -> nn.Module | None:
    """What a packed layer was, without its weight; None: one of torch's own. Itself where it is not packed."""
    backend = find_backend(layer)
    return layer if backend is None else backend.plain(layer)


def packed_state(layer: nn.Module) -> dict[str, object] | None:
    """What holds the layer's packed weight, to be put back attribute by attribute; None where it is not packed."""
    backend = find_backend(layer)
    if backend is None:
        return None
    return {name: getattr(layer, name) for name in backend.attributes if hasattr(layer, name)}


def logical_numels(model: nn.Module) -> Iterator[tuple[torch.Tensor, int]]:
    """The parameters of a model, and the packed weights that are none, with the number of weights each stands for."""
    packed = [(layer, backend) for layer in model.modules() if (backend := find_backend(layer)) is not None]
    tensors = {id(t): t for t in (*model.parameters(), *(getattr(layer, b.attributes[0]) for layer, b in packed))}
    numels = {id(getattr(layer, b.attributes[0])): math.prod(b.shape(layer)) for layer, b in packed}
    return ((tensor, numels.get(key, tensor.numel())) for key, tensor in tensors.items())


def keep_packed(modules: Iterable[tuple[str, nn.Module]], is_trainable: bool) -> None:
    """See to it that packed weights of (named) modules stay as they are packed, and that gradients can pass through.

    On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight in the first forward pass in eval mode, and leaves it
    so, for a kernel that has no backward pass (gradients go missing silently). It rounds the scales to bfloat16, and
    with the next `state_dict()`, which saving and loading an adapter call, it confuses them where they are not
    quantised themselves (0.50.2).

    Raises:
        ValueError: adapters are to be trained over a weight of torchao's that has activations rounded as well; no
            gradient comes through these.
    """
    for name, module in modules:
        if is_trainable and getattr(_held(module), "act_quant_kwargs", None) is not None:
            raise ValueError(
                f"{name} rounds its input to 8 bits (torchao's int8 with dynamic activations) and passes no gradient "
                "on: quantise with Int8WeightOnlyConfig to train, or give the adapter inference_mode=True"
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            _undo_repacking(module)
            module.support_avx512bf16_for_cpu = False


def held_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """`model.state_dict()` without what refuses to be in one: the packed embeddings of bitsandbytes raise an error."""
    embeddings = [m for m in model.modules() if _named(m, "bitsandbytes", "Embedding4bit", "Embedding8bit")]
    for module in embeddings:
        module.__dict__["_save_to_state_dict"] = lambda *args: None
    try:
        return model.state_dict()
    finally:
        for module in embeddings:
            del module.__dict__["_save_to_state_dict"]


def forget_quantization(model: nn.Module) -> None:
    """Let a transformers model whose weights are plain numbers again know so: saving and Trainer ask."""
    model.__dict__.pop("hf_quantizer", None)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        model.__dict__.pop(name, None)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config


def _held(layer: nn.Module, name: str = "weight") -> torch.Tensor | None:
    """A tensor that the layer itself holds; what it computes, or gets from a layer inside, is not asked for."""
    return layer._parameters.get(name, layer._buffers.get(name))


def _in_the_clear(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1  # types of 8 bits come with scales


def _named(obj: object, library: str, *names: str) -> bool:
    """Whether an object is of such a class of a library, or a subclass; the library need not be there to be asked."""
    return any(cls.__name__ in names and cls.__module__.startswith(library) for cls in type(obj).__mro__)


# bitsandbytes


def _state_4bit(layer: nn.Module):
    """The `QuantState` of a 4-bit layer; the weight loses its own where FSDP exchanges it."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _undo_repacking(layer: nn.Module) -> None:
    """See `keep_packed`."""
    state = _state_4bit(layer)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # by which bitsandbytes undoes it, but for the order of the scales
    if state is not None and not state.nested and state.absmax.dim() == 2:  # (blocks of a row, rows)
        state.absmax = state.absmax.T.flatten().float()


def _dequantize_4bit(layer: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    _undo_repacking(layer)
    return dequantize_4bit(layer.weight.data, _state_4bit(layer))


def _requantize_4bit(layer: nn.Module, weight: torch.Tensor) -> None:
    from bitsandbytes.nn import Params4bit

    old, state = layer.weight, _state_4bit(layer)
    new = Params4bit(
        weight.float(),
        blocksize=state.blocksize,
        compress_statistics=getattr(old, "compress_statistics", state.nested),
        quant_type=state.quant_type,
        quant_storage=old.dtype,
        module=layer,
    ).to(old.device)
    new.quant_state.dtype = state.dtype  # it says what the weight is dequantised to, and was set to what came in
    layer.weight = new


def _dequantize_8bit(layer: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    # The first forward pass moves the scales from the weight to the layer's state.
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return int8_vectorwise_dequant(layer.weight.data, scale)


def _requantize_8bit(layer: nn.Module, weight: torch.Tensor) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    numbers, scale, _ = int8_vectorwise_quant(weight.half())
    if hasattr(layer, "state"):
        layer.state = copy.copy(layer.state)
        layer.state.reset_grads()  # its numbers and scales; the next forward pass takes the weight's
    layer.weight = Int8Params(numbers, requires_grad=False, has_fp16_weights=False, CB=numbers, SCB=scale)


# HQQ, torchao, quanto


def _requantize_hqq(layer: nn.Module, weight: torch.Tensor) -> None:
    del layer.W_q  # the name of a parameter does not take the tensor that `quantize` sets first
    layer.quantize(weight, **layer.quant_config)


def _requantize_torchao(layer: nn.Module, weight: torch.Tensor) -> None:
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    old = layer.weight
    rows, columns = old.block_size
    if columns < old.shape[1]:
        granularity = PerGroup(columns)
    else:
        granularity = PerRow() if rows == 1 else PerTensor()
    is_symmetric = old.zero_point is None or not old.zero_point.any()
    new = type(old).from_hp(
        weight.to(old.dtype),
        granularity,
        MappingType.SYMMETRIC if is_symmetric else MappingType.ASYMMETRIC,
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )
    layer.weight = nn.Parameter(new, requires_grad=False)


def _requantize_quanto(layer: nn.Module, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    layer.freeze()  # packs what it finds as weight
    layer.weight.requires_grad_(False)


def _from(module: str) -> Callable[[nn.Module], bool]:
    """Match layers whose weight is a tensor of a class from a library's `module`."""

    return lambda layer: any(cls.__module__.startswith(module) for cls in type(_held(layer)).__mro__)


def _dequantize_tensor(layer: nn.Module) -> torch.Tensor:
    """For libraries whose weights are tensors that can do it themselves."""
    return layer.weight.dequantize()


# Layers that are known by their attributes


def read_through_forward(layer: nn.Module) -> torch.Tensor:
    """The weight (O, I) of a packed linear layer, from what its own kernel makes of the identity."""
    held = [*layer.parameters(), *layer.buffers()]
    dtype = next((t.dtype for t in held if _in_the_clear(t)), torch.float16)  # the scales'
    rows = torch.eye(stored_shape(layer)[1], dtype=dtype, device=held[0].device)
    bias = getattr(layer, "bias", None)
    try:
        if bias is not None:
            layer.bias = None  # adding and subtracting it would round
        return layer(rows).T
    finally:
        if bias is not None:
            layer.bias = bias


def _weight_shape(layer: nn.Module) -> torch.Size:
    return layer.weight.shape


def _eetq_shape(layer: nn.Module) -> torch.Size:
    """EETQ stores the weight (I, O), and transformers' layer does not say its sizes otherwise."""
    return torch.Size(reversed(layer.weight.shape))


def _having(*attributes: str) -> Callable[[nn.Module], bool]:
    return lambda layer: all(_held(layer, name) is not None for name in attributes)


def _is_packed(layer: nn.Module) -> bool:
    weight = _held(layer)
    return weight is not None and not _in_the_clear(weight) and not weight.is_complex()


def _is_cast(layer: nn.Module) -> bool:
    """torch's own layer with a weight of 8 bits and no scales, which somebody casts for each forward (diffusers)."""
    return type(layer) in _TORCH_LAYERS and _is_packed(layer) and layer.weight.is_floating_point()


def _cast(layer: nn.Module, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


# The first that matches has a layer: those that are known by their classes, and then those known by their attributes.
_BACKENDS += [
    QuantizationBackend(
        "bitsandbytes 4-bit",
        lambda layer: _named(layer, "bitsandbytes", "Linear4bit", "Embedding4bit") and _state_4bit(layer) is not None,
        _dequantize_4bit,
        _requantize_4bit,
        ("weight", "quant_state"),
        casts_input=True,
    ),
    QuantizationBackend(
        "bitsandbytes 8-bit",
        lambda layer: (
            _named(layer, "bitsandbytes", "Linear8bitLt", "Embedding8bit") and layer.weight.dtype == torch.int8
        ),
        _dequantize_8bit,
        _requantize_8bit,
        ("weight", "state"),
        casts_input=True,
    ),
    QuantizationBackend(
        "HQQ",
        lambda layer: _named(layer, "hqq", "HQQLinear") and layer.W_q is not None,
        lambda layer: layer.dequantize(),
        _requantize_hqq,
        ("W_q", "meta"),
    ),
    QuantizationBackend(
        "torchao int8",
        lambda layer: _named(_held(layer), "torchao", "Int8Tensor"),
        lambda layer: layer.weight.dequantize(torch.float32),  # it computes in the type of its input
        _requantize_torchao,
        casts_input=True,
    ),
    QuantizationBackend("torchao", _from("torchao"), _dequantize_tensor),
    # Of convolutions, too.
    QuantizationBackend("quanto", _from("optimum.quanto"), _dequantize_tensor, _requantize_quanto, shape=_weight_shape),
    QuantizationBackend("EETQ", _having("weight_scales"), read_through_forward, shape=_eetq_shape),
    *(
        QuantizationBackend(name, _having(*held), read_through_forward, attributes=(weight,))
        for name, weight, held in (
            ("GPTQ", "qweight", ("qweight", "qzeros", "scales", "g_idx")),
            ("AWQ", "qweight", ("qweight", "qzeros", "scales")),
            ("AQLM", "codes", ("codes", "codebooks")),
            ("FP8", "weight", ("weight_scale_inv",)),
        )
    ),
    QuantizationBackend("cast", _is_cast, lambda layer: layer.weight.float(), _cast, shape=_weight_shape),
    QuantizationBackend("packed", _is_packed, read_through_forward),
]

explain_missing(__name__)
