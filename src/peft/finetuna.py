"""finetuna: several fine-tuned models over one base model in 8 bits.

    import peft.finetuna as ft

    ft.quantize_base_model(base)
    first, second = ft.new_finetuned(base), ft.new_finetuned(base, adapt_layers={"q_proj", "v_proj"})

Every model is a `PeftModel` with LoRA adapters of its own. What is frozen it holds in the base model's memory, through
parameters of its own: each model can be trained, cast, moved and merged without the others noticing. The layers in
8 bits are those of `utils/blockwise.py`; everything else is LoRA as it is.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from .config import PeftConfig, documented_dataclass
from .mapping_func import get_peft_model
from .peft_model import PeftModel
from .tuners.common_config import TargetedConfig
from .tuners.lora import LoraConfig, LoraModel
from .tuners.ops import make_op
from .tuners.targeting import name_matches, shortest_endings
from .tuners.tuners_utils import BaseTunerLayer
from .utils.blockwise import Blockwise, is_product, quantize_
from .utils.constants import DUMMY_TARGET_MODULES
from .utils.other import AuxiliaryTrainingWrapper, shared_parameters
from .utils.peft_types import PeftType
from .utils.quantization_utils import is_quantized
from .utils.save_and_load import adapter_keys
from .utils.warning import warn

__all__ = [
    "EmbeddingAdapterConfig", "FinetunaConfig", "LinearAdapterConfig", "get_lora_adaptable_modules", "load_finetuned",
    "new_finetuned", "prepare_base_model", "quantize_base_model", "state_dict",
]  # fmt: skip

_HEAD = frozenset({"lm_head"})
# Layer of a base model -> layers in 8 bits that were made from it, for as long as their models live.
_PACKED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Blockwise]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _AdapterConfig:
    r: int = 4
    """Rank."""
    alpha: float = 1
    """The delta is scaled by alpha / r."""

    def __post_init__(self):
        try:
            LoraConfig(**self.lora_fields())
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("lora_", "")) from None  # by the names that the fields have here

    def lora_fields(self) -> dict:
        """These values by LoraConfig's names."""
        return {name if name == "r" else f"lora_{name}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class EmbeddingAdapterConfig(_AdapterConfig):
    """The adapter of an embedding: `alpha / r * B A` beside its table."""


@dataclass(frozen=True)
class LinearAdapterConfig(_AdapterConfig):
    """The adapter of a linear layer: `alpha / r * (B A x + b)` beside its output."""

    dropout: float = 0.0
    """Probability of dropping an input of the adapter, in training."""
    bias: bool = True
    """Whether the adapter has a trainable bias b."""


@documented_dataclass
class FinetunaConfig(TargetedConfig):
    """A LoRA of which every layer has its own rank, alpha, dropout and bias, as `new_finetuned` makes it."""

    method = PeftType.FINETUNA

    # What LoRA asks of a configuration.
    init_lora_weights: ClassVar[bool] = True
    layer_replication: ClassVar[None] = None
    target_parameters: ClassVar[None] = None

    adapters: dict[str, dict] = field(default_factory=dict)
    """The layers and their adapters: {end of the layer's name: fields of its LoraConfig}. target_modules follows."""
    modules_not_to_quantize: list[str] | None = None
    """Layers of the base model that the fine-tuned model does not have in 8 bits, besides those trained whole."""
    do_not_quantize: bool = False
    """Leave all layers as the base model has them."""

    def __post_init__(self):
        self.target_modules = list(self.adapters) or DUMMY_TARGET_MODULES
        super().__post_init__()
        for fields in self.adapters.values():
            LoraConfig(**fields)

    def of_layer(self, key: str) -> LoraConfig:
        """The LoRA of the layer `key`."""
        return LoraConfig(**self.adapters[_entry(self.adapters, key)])


def _entry(entries: Collection[str], key: str) -> str | None:
    """The name among `entries` that means the layer `key`; the longest, if several do."""
    return max((name for name in entries if name_matches([name], key)), key=len, default=None)


class FinetunaModel(LoraModel):
    """LoRA layers as `FinetunaConfig` describes them, one by one."""

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key):
        config = config.of_layer(current_key)
        super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key)

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As everywhere; and what the base model ties stays tied where both ends are trained whole."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        own: dict[int, nn.Parameter] = {}
        for wrapper in self.wrappers():
            if adapter_name not in wrapper.modules_to_save:
                continue
            pairs = zip(wrapper.original_module.modules(), wrapper.modules_to_save[adapter_name].modules())
            for original, module in pairs:
                for name, parameter in original._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = own.setdefault(id(parameter), module._parameters[name])


# Names


def _check_names(**given: Collection[str]) -> None:
    for argument, names in given.items():
        if isinstance(names, str):
            raise TypeError(f"{argument} must be a set of names, got the string {names!r}: write {{{names!r}}}")


def _is_inside(key: str, names: Collection[str]) -> bool:
    """Whether module `key` is, or lies in, a module that `names` mean (by the ends of their names)."""
    parts = key.split(".")
    return any(name_matches(names, ".".join(parts[:length])) for length in range(1, len(parts) + 1))


def _warn_of_unknown(model: nn.Module, **given: Collection[str]) -> None:
    """Warn of names that no module has. (Not of `lm_head`, which is a default for all models.)"""
    keys = [key for key, _ in model.named_modules()]
    for argument, names in given.items():
        unknown = sorted(n for n in names if n not in _HEAD and not any(name_matches([n], key) for key in keys))
        if unknown:
            warn(f"{argument} names {unknown}, which the model does not have, so that they have no effect")


def _refuse_adapted(model: nn.Module) -> None:
    if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules()):
        raise ValueError("The model has adapters already; finetuna takes the base model, of which it makes new ones")


def _adaptable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, layer in model.named_modules():
        kind = getattr(make_op(layer), "kind", None) if key else None
        if kind == "Embedding" or (kind == "Linear" and (is_quantized(layer) or is_product(layer))):
            yield key, layer


def get_lora_adaptable_modules(model: nn.Module) -> set[str]:
    """The names that the layers which can be adapted have in their parents: linear layers and embeddings."""
    _refuse_adapted(model)
    return {key.rpartition(".")[2] for key, _ in _adaptable_layers(model)}


# The base model


def quantize_base_model(model: nn.Module, modules_not_to_quantize: Collection[str] = _HEAD) -> nn.Module:
    """Put the linear layers (`Conv1D` too) and embeddings of a model into 8 bits, in place, and freeze them.

    One layer at a time: the most memory that it takes is the model, the 8-bit form of one layer, and a few MB.

    Args:
        modules_not_to_quantize: names of modules (their ends do) that are left as they are, with all that is in them.

    Returns:
        `model`.

    Raises:
        ValueError: the model is quantised already, has adapters, or has layers that cannot be quantised.
    """
    _check_names(modules_not_to_quantize=modules_not_to_quantize)
    _refuse_adapted(model)
    done = next((key for key, layer in model.named_modules() if isinstance(layer, Blockwise)), None)
    if done is not None:
        raise ValueError(
            f"The model is quantised already ({done} is in 8 bits): call quantize_base_model once, with everything "
            "that is to stay as it is in modules_not_to_quantize"
        )
    _warn_of_unknown(model, modules_not_to_quantize=modules_not_to_quantize)
    _quantize(model, modules_not_to_quantize, source=model)
    return model


prepare_base_model = quantize_base_model


def _quantize(model: nn.Module, leave: Collection[str], source: nn.Module) -> None:
    """Quantise `model`, a copy of `source` or that itself. What other copies have in 8 bits is shared with them."""
    clear = {key: layer for key, layer in _adaptable_layers(model) if not is_quantized(layer)}
    layers = {key: layer for key, layer in clear.items() if not _is_inside(key, leave)}
    origins = {key: source.get_submodule(key) for key in layers}
    shared = shared_parameters(model)
    parted = any(id(layer.weight) in shared for layer in layers.values())
    quantize_(layers, {key: _PACKED.get(origin, ()) for key, origin in origins.items()})
    for key, layer in layers.items():
        _PACKED.setdefault(origins[key], weakref.WeakSet()).add(layer)
    config = getattr(model, "config", None)
    if parted and getattr(config, "tie_word_embeddings", False):
        # Or transformers would put the packed table into the head. Other models may have the same config object.
        own = copy.deepcopy(config)
        own.tie_word_embeddings = False
        for module in model.modules():
            if vars(module).get("config") is config:
                module.config = own


def _shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same numbers, frozen.

    The parameters are other objects, so that freezing, casting, moving and merging concern one model. Buffers that are
    saved are state (running statistics), which a forward pass may change, and are copied; the others are constants.

    Raises:
        ValueError: parameters are not here.
    """
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"{empty[0]} is empty or off-loaded, and cannot be shared: load the whole model first")
    memo: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        # Parameters of other libraries (bitsandbytes in 4 bits) carry more than numbers.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and (isinstance(module, Blockwise) or name in module._non_persistent_buffers_set):
                memo[id(buffer)] = buffer.detach()
    new = copy.deepcopy(model, memo)
    new.register_load_state_dict_pre_hook(_part_from_base)
    return new


@torch.no_grad()
def _part_from_base(model: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str, *_) -> None:
    """Before other numbers are loaded into what is shared, give the model memory of its own for them."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        new = tensors.get(prefix + name)
        if new is None or tensor.requires_grad or new.shape != tensor.shape:
            continue
        if not torch.equal(tensor, new.to(tensor.device, tensor.dtype)):
            tensor.data = tensor.detach().clone()


def _copy_for(model: nn.Module, config: FinetunaConfig) -> nn.Module:
    """A copy over the same numbers, with the layers in 8 bits that `config` wants so.

    Raises:
        ValueError: a layer that it wants as it was before it was quantised.
    """
    leave = {*(config.modules_to_save or ()), *(config.modules_not_to_quantize or ())}
    packed = [key for key, layer in model.named_modules() if key and is_quantized(layer) and _is_inside(key, leave)]
    if packed:
        raise ValueError(
            f"{packed[0]} is to be trained whole or not to be quantised, but the base model has it in 8 bits, and its "
            "original weights are gone: load the base model again and give quantize_base_model this name in "
            "modules_not_to_quantize, or take it out of plain_layers and modules_not_to_quantize here"
        )
    new = _shared_copy(model)
    if not config.do_not_quantize:
        _quantize(new, leave, source=model)
    return new


# Fine-tuned models


def new_finetuned(
    model: nn.Module,
    adapt_layers: Collection[str] | None = None,
    plain_layers: Collection[str] = _HEAD,
    embedding_config: EmbeddingAdapterConfig | Mapping[str, EmbeddingAdapterConfig] = EmbeddingAdapterConfig(),
    linear_config: LinearAdapterConfig | Mapping[str, LinearAdapterConfig] = LinearAdapterConfig(),
    modules_not_to_quantize: Collection[str] = frozenset(),
    modules_not_to_freeze: Collection[str] = frozenset(),
    do_not_quantize: bool = False,
) -> PeftModel:
    """A new model to fine-tune, which shares all that is frozen with the base model and with its siblings.

    Its linear layers and embeddings are in 8 bits, quantised here where the base model's are not (once for all
    models), those of `adapt_layers` have adapters, the modules of `plain_layers` are copies that train whole, and
    everything else is frozen. The base model stays as it is. All names are those of modules, or ends of them.

    Args:
        model: the base model, quantised or not.
        adapt_layers: linear layers and embeddings that get adapters; None: all but those in `plain_layers`.
        plain_layers: modules of any kind that train whole, neither quantised nor adapted.
        embedding_config, linear_config: the adapters; one for all layers, or `{name: configuration}`.
        modules_not_to_quantize: modules that keep their weights as they are, adapted or not.
        modules_not_to_freeze: modules that train whole; linear layers and embeddings in them must not be quantised.
        do_not_quantize: leave all layers as the base model has them.

    Raises:
        ValueError: a name in `adapt_layers` that no linear layer and no embedding has; an adapted layer without an
            entry in its configuration, or that is plain or not frozen; a layer that is to train, or not to be
            quantised, but is (or would be).
        TypeError: a string in place of a set of names, a configuration of another kind.
    """
    given = {
        "plain_layers": plain_layers,
        "modules_not_to_quantize": modules_not_to_quantize,
        "modules_not_to_freeze": modules_not_to_freeze,
    }
    _check_names(adapt_layers=adapt_layers, **given)
    _refuse_adapted(model)
    layers = dict(_adaptable_layers(model))
    adapted = _adapted_layers(layers, adapt_layers, plain_layers, modules_not_to_freeze)
    left = {*plain_layers, *modules_not_to_quantize}
    for key in layers:
        if _is_inside(key, modules_not_to_freeze) and not (do_not_quantize or _is_inside(key, left)):
            raise ValueError(
                f"{key} is in modules_not_to_freeze, but what is in 8 bits cannot train: name it in plain_layers, or "
                "in modules_not_to_quantize too"
            )
    _warn_of_unknown(model, **given)
    config = FinetunaConfig(
        adapters=_adapters(model, adapted, linear_config, embedding_config),
        modules_to_save=_whole_modules(model, {*plain_layers, *modules_not_to_freeze}),
        modules_not_to_quantize=sorted(modules_not_to_quantize) or None,
        do_not_quantize=do_not_quantize,
    )
    if not (config.adapters or config.modules_to_save):
        raise ValueError("Nothing would train: no layer of the model is adapted, and none is plain")
    return get_peft_model(_copy_for(model, config), config)


def load_finetuned(
    model: nn.Module, folder: str | os.PathLike, is_trainable: bool = False, adapter_name: str = "default"
) -> PeftModel:
    """A model that `save_pretrained` has written, over the base model `model`, which it shares as a new one does.

    Args:
        folder: or a name on the hub.
        is_trainable: whether it is to be trained on; else it is frozen.

    Raises:
        ValueError: no such files, another method's, or a base model that has in 8 bits what this one trains whole.
    """
    _refuse_adapted(model)
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, FinetunaConfig):
        raise ValueError(
            f"{str(folder)!r} holds an adapter of the method {config.peft_type}, not a model of finetuna's: load it "
            "with PeftModel.from_pretrained"
        )
    new = _copy_for(model, config)
    return PeftModel.from_pretrained(new, folder, adapter_name, is_trainable=is_trainable, config=config)


def state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """What a fine-tuned model owns, its adapters and plain layers, for `model.load_state_dict(..., strict=False)`."""
    if not isinstance(model, PeftModel):
        raise TypeError(f"state_dict takes a model that new_finetuned has made, got {type(model).__name__}")
    own = {key for name in model.peft_config for key in adapter_keys(model, name)}
    return {key: tensor for key, tensor in model.state_dict().items() if key in own}


def _adapted_layers(
    layers: Mapping[str, nn.Module], wanted: Collection[str] | None, plain: Collection[str], free: Collection[str]
) -> dict[str, nn.Module]:
    """Those of `layers` that get an adapter."""
    if wanted is None:
        adapted = {key: layer for key, layer in layers.items() if not _is_inside(key, plain)}
    else:
        adapted = {key: layer for key, layer in layers.items() if name_matches(wanted, key)}
        unknown = sorted(name for name in wanted if not any(name_matches([name], key) for key in layers))
        if unknown:
            raise ValueError(
                f"adapt_layers names {unknown}, which no linear layer and no embedding of the model is called; there "
                f"are {sorted({key.rpartition('.')[2] for key in layers})}"
            )
    for argument, names in (("plain_layers", plain), ("modules_not_to_freeze", free)):
        both = [key for key in adapted if _is_inside(key, names)]
        if both:
            raise ValueError(
                f"{both[0]} cannot be adapted and train whole: take it out of adapt_layers or out of {argument}"
                + (" (adapt_layers=None adapts everything but plain_layers)" if wanted is None else "")
            )
    return adapted


def _adapters(model: nn.Module, adapted: Mapping[str, nn.Module], linear, embedding) -> dict[str, dict]:
    """`FinetunaConfig.adapters`: the layers that have the same adapter under as few names as can tell them apart."""
    keys = {key for key, _ in model.named_modules() if key}
    layers_of: dict[EmbeddingAdapterConfig | LinearAdapterConfig, set[str]] = {}
    used: set[str] = set()
    for key, layer in adapted.items():
        is_embedding = isinstance(layer, nn.Embedding)
        argument, config = ("embedding_config", embedding) if is_embedding else ("linear_config", linear)
        if isinstance(config, Mapping):
            entry = _entry(config, key)
            if entry is None:
                raise ValueError(
                    f"{argument} has no entry for the adapted layer {key} (it has {sorted(config)}): add one called "
                    f"{key.rpartition('.')[2]!r}, or leave the layer out of adapt_layers"
                )
            used.add(entry)
            config = config[entry]
        kind = EmbeddingAdapterConfig if is_embedding else LinearAdapterConfig
        if not isinstance(config, kind):
            raise TypeError(f"{argument} must hold {kind.__name__}, got {type(config).__name__} for {key}")
        layers_of.setdefault(config, set()).add(key)
    for argument, config in (("linear_config", linear), ("embedding_config", embedding)):
        unused = sorted(set(config) - used) if isinstance(config, Mapping) else []
        if unused:
            warn(f"{argument} has entries that no adapted layer uses: {unused}")
    return {
        name: config.lora_fields()
        for config, own in layers_of.items()
        for name in sorted(shortest_endings(own, keys - own))
    }


def _whole_modules(model: nn.Module, names: Collection[str]) -> list[str] | None:
    """`modules_to_save` for the modules that `names` mean."""
    keys = {key for key, _ in model.named_modules() if key}
    whole = {key for key in keys if name_matches(names, key) and not _is_inside(key.rpartition(".")[0], names)}
    return sorted(shortest_endings(whole, keys - whole)) or None
