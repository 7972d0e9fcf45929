"""All parts of adapters in a model at once: which are active, switching, freezing, removing, widening.

The functions work on any model that holds adapters, wrapped in a `PeftModel` or not; `BaseTuner` and `peft.functional`
are both built on them. What is active, disabled and frozen is kept in the parts alone, so that several tuners on one
model, and libraries that switch layers one by one, see the same state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import nn

from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING, is_adapter_key
from ..utils.other import (
    AdapterParts,
    AuxiliaryTrainingWrapper,
    Places,
    memory_of,
    shared_parameters,
    walk,
)
from ..utils.placement import reshard
from ..utils.quantization_utils import is_quantized, stored_weight
from ..utils.warning import warn
from .ops import make_op
from .tuners_utils import BaseTunerLayer, as_list

PROMPTS = "_peft_prompts"  # attribute of a base model: the `PromptEncoders` of its adapters, if it has any
_BIASES = "_peft_trained_biases"  # attribute of a base model: its `TrainedBiases`, if an adapter trains any


class TrainedBiases(AdapterParts):
    """The base model's own biases that adapters train (`bias` "all" or "<method>_only"), as one more part of them.

    Args:
        model: the base model.
        configs: its adapters' configurations, `{name: configuration}`; kept, not copied.
    """

    def __init__(self, model: nn.Module, configs: dict):
        self._model, self._configs = model, configs
        self._init_flags()

    @property
    def _available_adapters(self) -> set[str]:
        return {name for name, config in self._configs.items() if getattr(config, "bias", "none") != "none"}

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        return trained_biases(self._model, self._configs.get(name), name)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        for name in self._available_adapters:
            self._set_flags(name, name in as_list(adapter_names) and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Freeze them: their values stay, and belong to the base model from now on."""
        self._set_flags(adapter_name, False)
        self._forget_flags(adapter_name)


def trained_biases(model: nn.Module, config, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """`(name, parameter)` of the base model's biases that an adapter's configuration trains.

    `config.bias` is "none", "all", or "<method>_only" (those of the layers that have the adapter).
    """
    mode = getattr(config, "bias", "none")
    if mode == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not is_adapter_key(name) and "modules_to_save" not in name.split("."):
                yield name, parameter
    elif mode != "none":
        for path, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer) and adapter_name in layer._available_adapters:
                if (bias := layer.op.bias) is not None:
                    yield f"{path}.base_layer.{layer.op.bias_name}", bias


def keep_trained_biases(model: nn.Module, configs: dict) -> None:
    """Let `parts` know the biases that `configs` train."""
    biases = TrainedBiases(model, configs)
    if biases._available_adapters and _BIASES not in vars(model):
        vars(model)[_BIASES] = biases


def drop_trained_biases(model: nn.Module) -> None:
    """Undo `keep_trained_biases`; they are frozen like the rest of the base model."""
    biases = vars(model).pop(_BIASES, None)
    for name in biases._available_adapters if biases is not None else ():
        biases.delete_adapter(name)


def modules_with_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Adapter layers, modules that are trained whole, and what holds the encoders of prompts."""
    return (part for part in parts(model) if not isinstance(part, TrainedBiases))


def parts(model: nn.Module) -> Iterator[AdapterParts]:
    """Everything in `model` that holds something of an adapter: biases of the base model, layers, whole modules."""
    for _, module in walk(model):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield module
        else:
            yield from (vars(module)[name] for name in (_BIASES, PROMPTS) if name in vars(module))


def known_adapters(model: nn.Module) -> set[str]:
    return {*(getattr(model, "peft_config", None) or {}), *(n for p in parts(model) for n in p._available_adapters)}


def check_known(names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse names that are no adapters, or that are given twice.

    Raises:
        ValueError: so it is.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"An adapter can be named once only, got {list(names)}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"There is no adapter {unknown}; the model has {sorted(known)}")


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type | tuple[type, ...] = BaseTunerLayer,
) -> None:
    """Make one or several adapters active, in this order: they train (unless `inference_mode`), others do not.

    What its user froze stays frozen; a warning says so where nothing at all would train.

    Args:
        layer_cls: switch only adapter layers of this class. (Modules that are trained whole are always switched.)

    Raises:
        ValueError: an adapter that does not exist, or several that each replace the same module as a whole.
    """
    names = as_list(adapter_name)
    check_known(names, known_adapters(model))
    chosen = [part for part in parts(model) if isinstance(part, layer_cls) or not isinstance(part, BaseTunerLayer)]
    for part in chosen:
        part.check_active(names)
    reshard(model)
    if any(isinstance(part, BaseTunerLayer) and part.merged and part.active_adapters != names for part in chosen):
        warn("Adapters are merged into the base weights; they are unmerged before switching")
    for part in chosen:
        if isinstance(part, BaseTunerLayer) and part.merged and part.active_adapters != names:
            part.unmerge()
        part.set_adapter(names, inference_mode=inference_mode)
    flags = [t.requires_grad for p in chosen for n in names for _, t in p.adapter_tensors(n) if t.is_floating_point()]
    # Under no_grad the adapter is wanted for a forward pass, such as that of a reference model.
    if flags and not any(flags) and not inference_mode and torch.is_grad_enabled():
        warn(
            f"The adapters {names} are active now, but nothing of them will train: their parameters were frozen by "
            f"hand (requires_grad), and that holds. To train them call set_requires_grad({names}, True); to say that "
            "they are not to be trained, set_adapter(..., inference_mode=True)",
        )


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train or not, active or not. A freeze holds, whatever is activated or loaded, until taken back.

    Raises:
        ValueError: an adapter that does not exist.
    """
    check_known(as_list(adapter_names), known_adapters(model))
    for part in parts(model):
        part.set_requires_grad(adapter_names, requires_grad)


def remove_adapter(model: nn.Module, adapter_name: str, among: Collection[nn.Module] | None = None) -> None:
    """Delete an adapter (None: from all its parts); modules without another one get their old place back."""
    places = Places(model)
    for part in list(parts(model) if among is None else among):
        part.delete_adapter(adapter_name)
        if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not part._available_adapters:
            plain = part.base_layer if isinstance(part, BaseTunerLayer) else part.unload([])
            places.replace(part, plain)


def _check_method(model: nn.Module, adapter_name: str, prefix: str) -> None:
    """Refuse a prefix that is not of the adapter's method.

    transformers makes it from the method's name, so that is taken too (AdaLoRA: "lora_" in layers, "adalora_").
    """
    known = {(f"{getattr(t, 'value', t).lower()}_", p): p for t, p in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    wanted = tuple(own for names, own in known.items() if prefix in names)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and adapter_name in m._available_adapters]
    if layers and not any(name.startswith(wanted) for layer in layers for name in layer.adapter_layer_names):
        raise ValueError(
            f"Adapter {adapter_name!r} is not of the method with the prefix {prefix!r}: its layers are "
            f"{type(layers[0]).__module__}.{type(layers[0]).__name__}. Leave the prefix out, or give the right one"
        )


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: type | tuple[type, ...] = BaseTunerLayer
) -> list[str]:
    """Remove an adapter from all layers; those that have no other one become plain layers again.

    If it was the only active one, the first that is left becomes active. Its configuration stays in
    `model.peft_config`, for the caller to remove.

    Args:
        prefix: of the adapter's method ("lora_"), to make sure that it is the one that was meant; None: do not ask.
        layer_cls: switch only layers of this class to the next adapter.

    Returns:
        The adapters that are active then.

    Raises:
        ValueError: an adapter that does not exist, that is merged, or that is of another method than `prefix` says.
    """
    check_known([adapter_name], known_adapters(model))
    if prefix is not None:
        _check_method(model, adapter_name, prefix)
    configs = getattr(model, "peft_config", None) or {}
    active = next((part.active_adapters for part in modules_with_adapters(model)), [])
    remove_adapter(model, adapter_name)
    left = [name for name in active if name != adapter_name]
    others = [name for name in configs if name != adapter_name]
    if active and not left and others:
        left = others[:1]
        warn(f"The active adapter was deleted; {left[0]!r} is active now")
        set_adapter(model, left, configs[left[0]].inference_mode, layer_cls)
    return left


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widen an adapter's half-precision parameters to float32, for stable training (where its method wants that)."""
    if not autocast_adapter_dtype:
        return
    for _, layer in walk(model):
        if isinstance(layer, BaseTunerLayer) and layer.widens_parameters:
            for _, parameter in layer.adapter_tensors(adapter_name):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> dict[nn.Module, nn.Module]:
    """Replace every packed layer of a model by one with the same weight in the clear; tied weights stay tied.

    Args:
        dtype: of the weights; None: the type of the model's first plain parameter, or, in a model that has none, what
            each layer computes in.

    Returns:
        `{new layer: packed layer}`.
    """
    packed = [layer for layer in model.modules() if is_quantized(layer)]
    others = {id(parameter) for layer in packed for parameter in layer.parameters()}
    for part in parts(model):
        others |= {id(parameter) for name in part._available_adapters for _, parameter in part.adapter_tensors(name)}
    if dtype is None:
        own = (p.dtype for p in model.parameters() if id(p) not in others and p.is_floating_point())
        dtype = next(own, None)
    places, replaced, weights = Places(model), {}, {}
    for layer in packed:
        plain = make_op(layer).plain(dtype)
        plain.weight = weights.setdefault(memory_of(stored_weight(layer)), plain.weight)
        places.replace(layer, plain)
        replaced[plain] = layer
    shared = shared_parameters(model)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.op.shared = not layer.keeps_ties and id(layer.op.weight) in shared
    return replaced
