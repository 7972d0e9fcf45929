"""What is trained whole beside an adapter (`ModulesToSaveWrapper`), and helpers that other libraries import."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import nn

from .._lazy import explain_missing
from . import constants
from .mixed_batch import run_by_row
from .placement import independent_copy
from .quantization_utils import find_backend


class AdapterParts:
    """Mixin of whatever holds parts of adapters: what they are, and which of them train."""

    # Attributes that map an adapter's name to its module or parameter, and to anything else.
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    # Whether each adapter takes the place of the whole module, so that one can be active at a time.
    replaces_module = False

    @property
    def stored_as(self) -> AdapterParts:
        """The part under whose name files have this one's tensors."""
        return self

    def check_active(self, adapter_names: Sequence[str]) -> None:
        """Refuse adapters that cannot be active together: a module has one replacement at a time."""
        here = [name for name in adapter_names if name in self._available_adapters]
        if self.replaces_module and len(here) > 1:
            raise ValueError(
                f"Only one adapter can replace a module as a whole, but {here} all do: activate one of them"
            )

    def _init_flags(self) -> None:
        self._shown_flags: dict[tuple[str, str], bool] = {}  # (path, adapter) -> requires_grad as we set it last
        self._user_frozen: set[tuple[str, str]] = set()

    def _forget_flags(self, name: str) -> None:
        self._user_frozen = {key for key in self._user_frozen if key[1] != name}
        self._shown_flags = {key: flag for key, flag in self._shown_flags.items() if key[1] != name}

    @property
    def _available_adapters(self) -> set[str]:
        return {name for attribute in self.adapter_layer_names for name in getattr(self, attribute, {})}

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """`(attribute path, parameter)` of every parameter of one adapter, frozen and integer ones too."""
        for attribute in self.adapter_layer_names:
            container = getattr(self, attribute, {})
            if name not in container:
                continue
            entry = container[name]
            if isinstance(entry, nn.Module):
                # Most are leaves, and `named_parameters` takes its time.
                own = entry.named_parameters() if entry._modules else entry._parameters.items()
                yield from ((f"{attribute}.{key}", parameter) for key, parameter in own if parameter is not None)
            else:
                yield attribute, entry

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not, active or not. Freezing holds until this is called with True."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for path, _ in self.adapter_tensors(name):
                if requires_grad:
                    self._user_frozen.discard((path, name))
                    self._shown_flags.pop((path, name), None)
                else:
                    self._user_frozen.add((path, name))
            self._set_flags(name, requires_grad)

    def _set_flags(self, name: str, train: bool) -> None:
        for path, parameter in self.adapter_tensors(name):
            if not parameter.is_floating_point():
                continue
            key = (path, name)
            if self._shown_flags.get(key) and not parameter.requires_grad:
                self._user_frozen.add(key)  # we had set it to train; somebody froze it since
            flag = train and key not in self._user_frozen
            parameter.requires_grad_(flag)
            self._shown_flags[key] = flag


def walk(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, but not into what adapter layers hold for every adapter: there may be many."""
    seen, waiting = set(), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if remove_duplicate and module in seen:
            continue
        seen.add(module)
        yield path, module
        children = module._modules
        if isinstance(module, AdapterParts) and "base_layer" in children:
            children = {"base_layer": children["base_layer"]}
        prefix = f"{path}." if path else ""
        waiting.extend((prefix + name, child) for name, child in reversed(children.items()) if child is not None)


class AuxiliaryTrainingWrapper(AdapterParts, nn.Module):
    """A module of the base model of which adapters have something of their own."""

    def __init__(self, module_to_save: nn.Module, adapter_name: str):
        nn.Module.__init__(self)
        self.original_module = module_to_save
        self._active_adapter: list[str] = [adapter_name]
        self._disable_adapters = False
        self._init_flags()

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter[0] if len(self._active_adapter) == 1 else self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_active(names)
        for name in self._available_adapters:
            self._set_flags(name, name in names and not inference_mode)
        self._active_adapter = names

    def delete_adapter(self, adapter_name: str) -> None:
        for attribute in self.adapter_layer_names:
            if adapter_name in (container := getattr(self, attribute)):
                del container[adapter_name]
        self._forget_flags(adapter_name)
        self._active_adapter = [name for name in self._active_adapter if name != adapter_name]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """`{key in the adapter's file: key in this module}`, both below the module's name; transformers asks for it."""
        return {
            name: f"{attribute}.{adapter_name}.{name}"
            for attribute in self.adapter_layer_names
            if adapter_name in getattr(self, attribute, {})
            for name in getattr(self, attribute)[adapter_name].state_dict()
        }


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with one trainable copy per adapter; the copy of the active adapter takes its place."""

    adapter_layer_names = ("modules_to_save",)
    replaces_module = True

    def __init__(self, module_to_save: nn.Module, adapter_name: str):
        super().__init__(module_to_save, adapter_name)
        self.modules_to_save = nn.ModuleDict()
        self.update(adapter_name)

    def update(self, adapter_name: str) -> None:
        """Add a copy for one more adapter."""
        if adapter_name in self.modules_to_save:
            return
        duplicate = independent_copy(self.original_module)
        for parameter in duplicate.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        self.modules_to_save[adapter_name] = duplicate

    def _current(self) -> nn.Module:
        return self.unload(() if self._disable_adapters else self._active_adapter)

    def forward(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        if adapter_names is None or self._disable_adapters:
            return self._current()(*args, **kwargs)
        ways = [name if name in self.modules_to_save else None for name in adapter_names]
        return run_by_row(lambda name, *args, **kwargs: self.unload([name])(*args, **kwargs), ways, args, kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "_active_adapter", "_disable_adapters"):
                raise
            return getattr(self._current(), name)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        return self.modules_to_save.parameters()

    def unload(self, adapter_names: Sequence[str]) -> nn.Module:
        """The module to put back: the copy of the first of `adapter_names` that has one, else the original."""
        name = next((name for name in adapter_names if name in self.modules_to_save), None)
        return self.original_module if name is None else self.modules_to_save[name]


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """`(parent, module, name of the module in its parent)` for the module called `key`."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


class Places:
    """Where a model holds each of its modules; one module may stand in several places.

    Found in one walk, so that replacing many modules does not walk the model once for each of them. Not for what is
    inside of adapters.
    """

    def __init__(self, model: nn.Module):
        self._of: dict[nn.Module, list[tuple[nn.Module, str]]] = {}  # module -> its parents, and its names in them
        for _, parent in walk(model):
            for name, child in parent._modules.items():
                if child is not None:
                    self._of.setdefault(child, []).append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever the model held `old`; then it may be replaced in its turn."""
        for parent, name in self._of[old]:
            setattr(parent, name, new)
        self._of.setdefault(new, []).extend(self._of[old])


def shared_parameters(model: nn.Module) -> set[int]:
    """`id`s of the parameters that more than one module holds (tied weights)."""
    seen: dict[int, int] = {}
    for _, module in walk(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """`(device, storage address, bytes)`: equal for tensors that are views of the whole of the same memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def memory_of(weight: torch.Tensor) -> Hashable:
    """What is equal for weights that are the same memory; a tensor that has none is itself."""
    has_memory = not (weight.is_meta or hasattr(weight, "__tensor_flatten__"))  # tensors around others have none
    return id_tensor_storage(weight) if has_memory else id(weight)


def infer_device() -> str:
    """The kind of accelerator at hand, else `"cpu"`."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    return weight.T if fan_in_fan_out else weight


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to `dtype` and trainable ones to float32, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Decoder inputs from labels, (batch, length): the start token first, -100 replaced by the padding token."""
    if pad_token_id is None:
        raise ValueError("pad_token_id must be given: labels of -100 are replaced by it")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this context no parameter trains; afterwards flags, gradients and modes are what they were before."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag, gradient in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def enable_checkpointing(model: nn.Module, options: dict | None = None) -> None:
    """Let a transformers model compute activations inside of its blocks twice instead of keeping them."""
    # The first name is the new one in transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantised model ready for training adapters on it.

    All its parameters are frozen, those held in half precision (norms, embeddings, heads) are widened to float32 if its
    packed layers take float32 inputs (those of bitsandbytes and torchao's int8 do), and gradient checkpointing is
    switched on, with the inputs made to require gradients where the checkpoints need it.

    Args:
        model: a transformers model; changed in place and returned.
        gradient_checkpointing_kwargs: as in `PreTrainedModel.gradient_checkpointing_enable`.
        auto_clear_cache: give freed accelerator memory back between the casts.
    """
    packed = [(layer, backend) for layer in model.modules() if (backend := find_backend(layer)) is not None]
    left = {id(parameter) for layer, _ in packed for parameter in layer.parameters()}
    widen = all(backend.casts_input for _, backend in packed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if widen and id(parameter) not in left and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        enable_checkpointing(model, options or None)
    return model


def fsdp_auto_wrap_policy(model: nn.Module):
    """An FSDP policy that wraps transformer blocks, and trainable leaves apart from frozen ones.

    The blocks are the classes that the model says must not be split, or those in `FSDP_TRANSFORMER_CLS_TO_WRAP`.

    Raises:
        ValueError: a class of that name is not in the model.
    """
    import os

    from accelerate.utils.dataclasses import get_module_class_from_name
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    default = ",".join(sorted(getattr(model, "_no_split_modules", None) or []))
    classes = set()
    for name in filter(None, os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", default).split(",")):
        found = get_module_class_from_name(model, name)
        if found is None:
            raise ValueError(f"FSDP should wrap {name}, but the model has no module of this class")
        classes.add(found)

    def is_trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and isinstance(weight, torch.Tensor) and weight.requires_grad

    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trainable_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, blocks])


# Other libraries import these from here.
explain_missing(
    __name__,
    {
        "TrainableTokensWrapper": "peft.tuners.trainable_tokens.wrapper",
        "get_pattern_key": "peft.tuners.targeting",
        **{name: "peft.utils.constants" for name in vars(constants) if name.isupper()},
    },
)
