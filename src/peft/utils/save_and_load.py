"""Adapters as state dicts and files.

Which tensor of an adapter has which key in a file is derived from the modules (`adapter_keys`), in one place, for
saving and loading alike: the adapter's name is left out, everything else stays.
"""

from __future__ import annotations

import errno
import os
import pickle
from collections import namedtuple
from collections.abc import Container
from typing import NamedTuple

import torch
from torch import nn

from .._lazy import explain_missing
from .constants import (
    DUMMY_TARGET_MODULES,
    PROMPT_NETWORK_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from .other import AdapterParts, AuxiliaryTrainingWrapper, infer_device, walk
from .placement import (
    OffloadedTensor,
    home_device,
    is_sharded,
    is_zero3,
    logical_shape,
    offload_hook,
    overwrite,
    own_tensor,
    reshard,
    whole_tensor,
    whole_tensors,
)
from .quantization_utils import held_state, is_quantized
from .warning import warn

IncompatibleKeys = namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])
# What wrappers around a module (FSDP, torch.compile, activation checkpointing) put into its parameters' names.
_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _holders(model: nn.Module):
    """`(path, module)` of everything in a model that holds tensors of adapters."""
    from ..tuners.base import BaseTuner

    return ((path, part) for path, part in walk(model) if isinstance(part, (AdapterParts, BaseTuner)))


class Place(NamedTuple):
    """Where a model holds one tensor of an adapter's file."""

    key: str
    """Of the tensor in the file."""
    owner: nn.Module
    """A module of the adapter's own, as near to the tensor as can be; the model for tensors of the base model."""
    name: str
    """Of the tensor in the owner's state dict."""
    holder: nn.Module | None = None
    """What holds it for the adapter: a layer, a wrapper, ...; None for tensors of the base model."""

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter or buffer itself."""
        try:
            module, attribute = own_tensor(self.owner, self.name)
            return getattr(module, attribute)
        except AttributeError:  # a packed weight's state dict has more than it has attributes
            return held_state(self.owner)[self.name]

    @property
    def is_elsewhere(self) -> bool:
        """Whether the tensor is sharded or off-loaded, so that copying into it would not do."""
        tensor = self.tensor
        return is_sharded(tensor) or (tensor.is_meta and offload_hook(own_tensor(self.owner, self.name)[0]) is not None)

    def write_elsewhere(self, value: torch.Tensor) -> None:
        tensor = self.tensor
        if is_sharded(tensor):
            overwrite(tensor, value)
        else:
            OffloadedTensor(*own_tensor(self.owner, self.name)).write(value.to(tensor.dtype))


def adapter_places(model: nn.Module, adapter_name: str) -> dict[str, Place]:
    """`{name in model.state_dict(): place}` of every tensor of one adapter; it takes no longer where there are many."""
    from ..tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Place] = {}
    paths = {module: path for path, module in _holders(model)}
    strangers = {
        path
        for module, path in paths.items()
        if isinstance(module, BaseTunerLayer) and not module.has_adapter(adapter_name)
    }
    for module, path in paths.items():
        if _holds_prompts(module, adapter_name):  # `BasePromptEncoder.to_file` makes the file's keys of these
            owner = module[adapter_name]
            for name in owner.state_dict():
                found[f"{path}.{adapter_name}.{name}"] = Place(f"prompt_encoder.{name}", owner, name, module)
        stored = paths[getattr(module, "stored_as", module)]
        if isinstance(module, BaseTunerLayer) and not module.numbered_in_files:
            stored = _without(strangers, stored)
        for attribute in module.adapter_layer_names:
            container = getattr(module, attribute, {})
            if adapter_name not in container or adapter_name in getattr(container, "_non_persistent_buffers_set", ()):
                continue
            memory = f"{path}.{attribute}.{adapter_name}"
            # A module that is trained whole has its own place in the file.
            file = _plain_name(stored if isinstance(module, AuxiliaryTrainingWrapper) else f"{stored}.{attribute}")
            entry = container[adapter_name]
            if attribute in getattr(module, "bare_in_files", ()):
                found[f"{memory}.weight"] = Place(file, entry, "weight", module)
            elif isinstance(entry, nn.Module):
                for name in entry.state_dict():
                    found[f"{memory}.{name}"] = Place(f"{file}.{_plain_name(name)}", entry, name, module)
            else:
                found[memory] = Place(file, container, adapter_name, module)
    return found


def _without(strangers: set[str], path: str) -> str:
    """The path that a module has in a model without these adapter layers, of which an adapter's file knows nothing."""
    here, there = "", []
    for part in path.split("."):
        if not (part == "base_layer" and here in strangers):
            there.append(part)
        here = f"{here}.{part}".removeprefix(".")
    return ".".join(there)


def adapter_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """`{key in model.state_dict(): key in the adapter's file}` for every tensor of one adapter."""
    return {name: place.key for name, place in adapter_places(model, adapter_name).items()}


def _holds_prompts(module: nn.Module, adapter_name: str) -> bool:
    from ..tuners.prompt_learning import PromptEncoders

    return isinstance(module, PromptEncoders) and adapter_name in module


def _prompt_encoder(model: nn.Module, adapter_name: str) -> nn.Module | None:
    return next((module[adapter_name] for _, module in walk(model) if _holds_prompts(module, adapter_name)), None)


def _config_of(model: nn.Module, adapter_name: str):
    configs = getattr(model, "peft_config", None)
    if not configs or adapter_name not in configs:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {sorted(configs or {})}")
    return configs[adapter_name]


def _bias_places(model: nn.Module, config, adapter_name: str) -> dict[str, Place]:
    from ..tuners.parts import trained_biases

    names = [name for name, _ in trained_biases(model, config, adapter_name)]
    return {name: Place(_plain_name(name), model, name) for name in names}


def _embedding_places(
    model: nn.Module, save_embedding_layers: bool | str, config, adapter_name: str
) -> dict[str, Place]:
    """The base model's embeddings, where they belong into the adapter's file."""
    from ..tuners.tuners_utils import BaseTunerLayer

    if not save_embedding_layers:
        return {}
    getters = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    modules = [module for getter in getters if callable(getter) and (module := getter()) is not None]
    if save_embedding_layers == "auto":
        if not _vocabulary_changed(model, config):
            modules = [m for m in modules if isinstance(m, BaseTunerLayer) and m.has_adapter(adapter_name)]
            modules = [m for m in modules if m.saves_embeddings]
            modules = [m for m in modules if not is_quantized(m.get_base_layer())]  # the base model is packed anew
        if modules:
            warn(
                "The base model's embeddings are saved with the adapter, because the adapter targets them or the "
                "vocabulary was resized. Give save_embedding_layers=True or False to choose",
            )
    bases = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in modules]
    bases = [base for base in bases if not isinstance(base, AuxiliaryTrainingWrapper)]
    for base in bases if save_embedding_layers is True else ():
        if not held_state(base):
            raise ValueError(
                f"save_embedding_layers=True, but {type(base).__name__} cannot be saved: leave it out, and the adapter "
                "is loaded on a base model that is packed anew"
            )
    names = [
        f"{path}.{name}"
        for path, module in (walk(model, remove_duplicate=False) if bases else ())
        if any(module is base for base in bases)
        for name in held_state(module)
    ]
    return {name: Place(_plain_name(name), model, name) for name in names}


def _vocabulary_changed(model: nn.Module, config) -> bool:
    """Whether the model's vocabulary differs from that of the base model's files (looked up locally only)."""
    name = getattr(config, "base_model_name_or_path", None)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not name or size is None:
        return False
    from transformers import AutoConfig

    try:
        original = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return False  # not a model on this machine: nothing to compare with
    return getattr(original, "vocab_size", size) != size


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter under their keys in a file, whole: sharded ones are gathered, off-loaded ones fetched.

    With sharded parameters all processes have to call this, together.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: the model's state dict where it has been gathered already; None: `model.state_dict()`.
        adapter_name: which adapter.
        unwrap_compiled: take the model out of `torch.compile` first.
        save_embedding_layers: whether the base model's embeddings belong to it; "auto": if the adapter targets them or
            the vocabulary was resized.

    Raises:
        ValueError: no such adapter, or no tensors of it (it has been unloaded).
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    return adapter_content(model, state_dict, adapter_name, save_embedding_layers)[0]


def adapter_content(
    model: nn.Module, state_dict: dict[str, torch.Tensor] | None, adapter_name: str, save_embedding_layers: bool | str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`get_peft_model_state_dict`, and, of a prompt that is still computed, the tensors that it is computed from."""
    from ..tuners.tuners_utils import BaseTunerLayer

    config = _config_of(model, adapter_name)
    places = adapter_places(model, adapter_name)
    if not places and getattr(config, "target_modules", None) != DUMMY_TARGET_MODULES:
        raise ValueError(
            f"The model has no tensors of adapter {adapter_name!r} any more: save it before unload() or "
            "merge_and_unload(); what they return is saved with its own save_pretrained"
        )
    places |= _bias_places(model, config, adapter_name)
    embeddings = _embedding_places(model, save_embedding_layers, config, adapter_name)
    if embeddings and any(getattr(module, "merged", False) for _, module in walk(model)):
        raise ValueError(
            "The base model's embeddings are to be saved with the adapter, but adapters are merged into its weights: "
            "call unmerge_adapter() first"
        )
    places |= embeddings
    if state_dict is None:
        wanted = _whole_tensors(model, places)
    else:
        places = {_plain_name(name): place for name, place in places.items()}
        given = {_plain_name(name): tensor for name, tensor in state_dict.items()}
        missing = [name for name in places if name not in given]
        if missing:
            raise ValueError(
                f"The state dict lacks {len(missing)} of the {len(places)} tensors of adapter {adapter_name!r}, such "
                f"as {missing[:3]}"
            )
        wanted = {name: whole_tensor(given[name]) for name in places}
    for path, module in walk(model):
        if isinstance(module, BaseTunerLayer) and module.has_adapter(adapter_name):
            module.before_save(adapter_name, path if state_dict is None else _plain_name(path), wanted)
    result = {place.key: wanted[name] for name, place in places.items()}
    encoder = _prompt_encoder(model, adapter_name)
    return (result, {}) if encoder is None else (encoder.to_file(result), encoder.network(result))


def _whole_tensors(model: nn.Module, places: dict[str, Place]) -> dict[str, torch.Tensor]:
    """The tensors in these places, with the numbers in them.

    Raises:
        ValueError: FSDP1 has flattened them, and gathers them for a whole model only.
    """
    flattened = [name for name in places if "_fsdp_wrapped_module" in name]
    if flattened:
        raise ValueError(
            f"{flattened[0]} is sharded by FSDP1: gather the model's state dict (FullyShardedDataParallel."
            "state_dict_type) and give it as state_dict"
        )
    reshard(model)
    return whole_tensors(model, {name: place.tensor for name, place in places.items()})


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Put tensors, under their keys in a file, into an adapter that exists already.

    Args:
        ignore_mismatched_sizes: warn about tensors of another shape and skip them, instead of an error.
        low_cpu_mem_usage: take the tensors over instead of copying them (for adapters on the meta device).

    Returns:
        `(missing_keys, unexpected_keys)`, as keys in a file: tensors of the adapter that are not in the dict, and
        tensors in the dict that belong nowhere.

    Raises:
        ValueError: no such adapter, it is merged, or it is empty (meta device) and `low_cpu_mem_usage` is not given.
        RuntimeError: tensors of another shape.
    """
    from ..tuners.tuners_utils import BaseTunerLayer

    reshard(model)
    config = _config_of(model, adapter_name)
    if any(adapter_name in getattr(module, "merged_adapters", ()) for _, module in walk(model)):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged, and with other tensors it could not be taken out again: call "
            "unmerge_adapter() before loading into it"
        )
    encoder = _prompt_encoder(model, adapter_name)
    if encoder is not None:
        peft_model_state_dict = encoder.from_file(peft_model_state_dict)
    places = adapter_places(model, adapter_name) | _bias_places(model, config, adapter_name)
    expected = {place.key: name for name, place in places.items()}
    # Of the base model a file may bring the embeddings, nothing else.
    embeddings = _embedding_places(model, "any", config, adapter_name)
    renamed = {_file_key(key, expected): tensor for key, tensor in peft_model_state_dict.items()}
    incoming = {expected[key]: tensor for key, tensor in renamed.items() if key in expected}
    layers = [
        (path, module)
        for path, module in walk(model)
        if isinstance(module, BaseTunerLayer) and module.has_adapter(adapter_name)
    ]
    for path, layer in layers:
        layer.before_load(adapter_name, path, incoming)
    renamed |= {key: incoming[expected[key]] for key in renamed if key in expected}  # as the layers have changed them
    names = {place.key: name for name, place in embeddings.items()} | expected
    found = {names[key]: tensor for key, tensor in renamed.items() if key in names}
    places = embeddings | places
    if mismatched := [
        f"{places[name].key}: {tuple(tensor.shape)} in the file, {tuple(shape)} in the model"
        for name, tensor in found.items()
        if (shape := logical_shape(places[name].tensor)) != tensor.shape
    ]:
        message = f"{len(mismatched)} tensors have another shape than the adapter's, such as {mismatched[:3]}"
        if not ignore_mismatched_sizes:
            raise RuntimeError(f"Error(s) in loading adapter {adapter_name!r}: size mismatch: {message}")
        warn(f"{message}; they are skipped")
        found = {name: t for name, t in found.items() if logical_shape(places[name].tensor) == t.shape}
    _fill({places[name]: tensor for name, tensor in found.items()}, adapter_name, assign=low_cpu_mem_usage)
    for layer in [layer for _, layer in layers if type(layer).after_load is not BaseTunerLayer.after_load]:
        if not any(t.is_meta for _, t in layer.adapter_tensors(adapter_name)):
            with layer.whole_adapter(adapter_name, write=True):
                layer.after_load(adapter_name)
    missing = [key for key in expected if key not in renamed]
    return IncompatibleKeys(missing, [key for key in renamed if key not in names])


def _fill(tensors: dict[Place, torch.Tensor], adapter_name: str, assign: bool) -> None:
    """Copy tensors into their places, or put them there.

    Raises:
        ValueError: places on the meta device, which nothing can be copied into.
    """
    for place in [place for place in tensors if place.is_elsewhere]:
        place.write_elsewhere(tensors.pop(place))
    empty = [place.key for place in tensors if place.tensor.is_meta]
    if empty and not assign:
        raise ValueError(
            f"{len(empty)} tensors of adapter {adapter_name!r} are empty (meta device), such as {empty[:3]}, and "
            "cannot be copied into: load with low_cpu_mem_usage=True"
        )
    by_owner: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for place, tensor in tensors.items():
        # Assigned tensors keep their dtype, so they have to be given the one that the adapter should have.
        new = tensor.to(place.tensor.dtype).to(_device_of(place, tensor)) if assign else tensor
        by_owner.setdefault(place.owner, {})[place.name] = new
    for owner, own in by_owner.items():
        owner.load_state_dict(own, strict=False, assign=assign)


def _device_of(place: Place, new: torch.Tensor) -> torch.device:
    """Where a tensor that is put into this place has to be: where the one there is, or, if that is empty, belongs."""
    from ..tuners.tuners_utils import BaseTunerLayer

    if not place.tensor.is_meta:
        return place.tensor.device
    holder = place.holder
    if isinstance(holder, BaseTunerLayer):
        module = holder.get_base_layer()
    elif isinstance(holder, AuxiliaryTrainingWrapper):
        module = holder.original_module
    else:
        module = getattr(holder, "word_embeddings", None)
    home = torch.device("cpu") if module is None else home_device(module)
    return new.device if home.type == "meta" else home


def _file_key(key: str, expected: Container[str]) -> str:
    """A key of a file in today's form.

    deltatuner calls wrapped bases `linear_sub`, and leaves layers unwrapped that its search switched off: their biases
    have the plain name.
    """
    key = _plain_name(key).replace(".linear_sub.", ".base_layer.")
    module, _, name = key.rpartition(".")
    wrapped = f"{module}.base_layer.{name}"
    return wrapped if key not in expected and wrapped in expected else key


def report_incompatible(result: IncompatibleKeys, adapter_name: str, source) -> None:
    """Warn about tensors that a file lacks or has too many."""
    for keys, what in (
        (result.missing_keys, "does not have %d tensors of adapter %r, which keep their initial values"),
        (result.unexpected_keys, "has %d tensors that adapter %r has no place for, which are ignored"),
    ):
        if keys:
            warn(
                f"{source} {what % (len(keys), adapter_name)}: {keys[:3]}{' ...' if len(keys) > 3 else ''}. Do the "
                "base model and the adapter's configuration belong to this file?",
            )


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs,
) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors from a folder or the hub.

    Looks for `adapter_model.safetensors`, its sharded form (`adapter_model.safetensors.index.json`), and
    `adapter_model.bin`, which is read with `weights_only=True`.

    Args:
        device: where to put the tensors; None: an accelerator if there is one.
        key_mapping: `{regular expression: replacement}` for keys of older model versions.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    import re

    from ..config import find_first

    hub = {key: value for key, value in hf_hub_download_kwargs.items() if value is not None}
    device = infer_device() if device is None else device
    names = [SAFETENSORS_WEIGHTS_NAME, SAFETENSORS_INDEX_NAME, WEIGHTS_NAME]
    path = find_first(model_id, names, "adapter weights", **hub)
    if path.endswith(SAFETENSORS_INDEX_NAME):
        shards = _shards(path, model_id, hub)
        tensors = {key: tensor for shard in shards for key, tensor in read_tensors(shard, device).items()}
    else:
        tensors = read_tensors(path, device)
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}
    return tensors


def load_prompt_network(
    model: nn.Module, adapter_name: str, model_id: str | os.PathLike, device: str | None = None, **hub
) -> dict[str, torch.Tensor]:
    """What an adapter's prompt is computed from, if the adapter computes it and the folder or the hub has that."""
    from ..config import find_file

    encoder = _prompt_encoder(model, adapter_name)
    path = None if encoder is None or encoder.head is None else find_file(model_id, PROMPT_NETWORK_NAME, **hub)
    return {} if path is None else read_tensors(path, device or infer_device())


def _shards(index_path: str, model_id, hub: dict) -> list[str]:
    from ..config import PeftConfigMixin, find_first

    index = PeftConfigMixin.from_json_file(index_path)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{index_path!r} must hold an object weight_map, which says where each tensor is")
    names = sorted(set(index["weight_map"].values()))
    return [find_first(model_id, [name], f"a shard that {SAFETENSORS_INDEX_NAME} names", **hub) for name in names]


def read_tensors(path: str, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read a file of tensors, `*.safetensors` or what torch.save wrote; raises ValueError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return load_file(path, device=str(device))
        return torch.load(path, map_location=device, weights_only=True)
    except (SafetensorError, EOFError, pickle.UnpicklingError, RuntimeError, OSError) as error:
        # torch tells an incomplete file from lack of memory by the text only, or it has sought before the beginning.
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path!r} is damaged, or no file of tensors: {error}") from error


def write_adapter(
    tensors: dict[str, torch.Tensor], folder: str, safe_serialization: bool = True, network: dict | None = None
) -> None:
    """Write an adapter's tensors into `folder`, beside and then renamed.

    Args:
        network: what its prompt is computed from, if it is; for training to go on.
    """
    files = {SAFETENSORS_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME: tensors}
    if network:
        files[PROMPT_NETWORK_NAME] = network
    for name, content in files.items():
        _write_tensors(content, os.path.join(folder, name))
    # What an earlier save left in another form would be found first.
    for name in (SAFETENSORS_WEIGHTS_NAME, SAFETENSORS_INDEX_NAME, WEIGHTS_NAME, PROMPT_NETWORK_NAME):
        other = os.path.join(folder, name)
        if name not in files and os.path.exists(other):
            os.remove(other)


def _write_tensors(tensors: dict[str, torch.Tensor], path: str) -> None:
    """Write tensors, those that share memory separately (safetensors refuses shared memory)."""
    from ..config import write_atomically

    seen: set[tuple] = set()
    content = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        content[key] = tensor.clone() if memory in seen and tensor.numel() else tensor
        seen.add(memory)
    if path.endswith(".safetensors"):
        from safetensors.torch import save_file

        write_atomically(path, lambda file: save_file(content, file, metadata={"format": "pt"}))
    else:
        write_atomically(path, lambda file: torch.save(content, file))


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's tensors, whole, under the names that they have without adapters."""
    own = _base_tensors(model)
    return {_base_key(key): tensor for key, tensor in whole_tensors(model, own).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor], strict: bool = True):
    """Load tensors, under the names that they have without adapters, into the base model of an adapted one."""
    names = {_base_key(key): key for key in _base_tensors(model)}
    missing = [key for key in names if key not in state_dict]
    unexpected = [key for key in state_dict if key not in names]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"Missing keys: {missing[:5]} ({len(missing)}), unexpected: {unexpected[:5]} ({len(unexpected)})"
        )
    reshard(model)
    found = {names[key]: tensor for key, tensor in state_dict.items() if key in names}
    places = {name: Place("", model, name) for name in found}
    for name in [name for name in found if places[name].is_elsewhere]:
        places[name].write_elsewhere(found.pop(name))
    model.load_state_dict(found, strict=False)
    return IncompatibleKeys(missing, unexpected)


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of the state dict that belongs to no adapter."""
    others: set[str] = set()
    for path, holder in _holders(model):
        for attribute in (*holder.adapter_layer_names, *getattr(holder, "other_param_names", ())):
            container = getattr(holder, attribute, None)
            if isinstance(container, nn.Module):
                others.update(f"{path}.{attribute}.{key}" for key in container.state_dict())
    sharded = {name: p for name, p in model.named_parameters(remove_duplicate=False) if is_zero3(p)}
    return {key: sharded.get(key, tensor) for key, tensor in model.state_dict().items() if key not in others}


def _base_key(key: str) -> str:
    key = _plain_name(key).removeprefix("base_model.model.")
    return key.replace(".base_layer", "").replace(".original_module.", ".")


explain_missing(__name__)
