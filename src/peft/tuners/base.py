"""`BaseTuner`: puts a method's layers into a model, once for all methods.

It finds the targets, replaces them by adapter layers, wraps what is trained whole (`modules_to_save`), marks what
trains, and carries out what concerns all layers at once: switching, merging, deleting, unloading. A method gives its
`prefix`, its `tuner_layer_cls`, its default targets, and, where it needs them, `layer_kwargs` and `shared_state`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from .._lazy import explanation
from ..utils.constants import DUMMY_TARGET_MODULES, SEQ_CLS_HEAD_NAMES
from ..utils.error import NoMatchingPeftModuleError
from ..utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    Places,
    _get_submodules,
    shared_parameters,
    walk,
)
from ..utils.placement import home_device, offload_hook, own_tensor, reshard
from ..utils.quantization_utils import forget_quantization, is_quantized, keep_packed
from ..utils.warning import warn
from ._buffer_dict import BufferDict
from .attention import check_attention, drops
from .ops import OP_KINDS, make_op
from .parts import (
    cast_adapter_dtype,
    check_known,
    delete_adapter,
    dequantize_layers,
    drop_trained_biases,
    keep_trained_biases,
    modules_with_adapters,
    parts,
    remove_adapter,
    set_adapter,
    set_requires_grad,
    trained_biases,
)
from .targeting import (
    TASK_HEAD_NAMES,
    is_target,
    keep_called,
    keys_ending_in,
    layer_index,
    model_config,
    name_matches,
    resolve_all_linear,
    unmatched_entries,
    usual_modules,
)
from .tuners_utils import BASE_ADAPTER, BaseTunerLayer, MergeError, as_list, base_of


def check_adapter_name(name: str) -> None:
    """Refuse names that a ModuleDict or a key of an adapter file cannot carry.

    Raises:
        ValueError: an empty name, one with a dot, a slash or a control character, one of nn.Module's or of a dict's
            attributes, or `__base__`.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"An adapter's name must be a non-empty string, got {name!r}")
    if not name.isprintable() or "/" in name or "\\" in name:
        raise ValueError(f"An adapter's name is a folder's too, without slashes and control characters, got {name!r}")
    if "." in name:
        raise ValueError(f"An adapter's name must not contain a dot (it separates the parts of a key), got {name!r}")
    if name == BASE_ADAPTER:
        raise ValueError(f"{BASE_ADAPTER!r} stands for the base model in mixed batches; give the adapter another name")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"{name!r} is an attribute of torch's containers; give the adapter another name")


class BaseTuner(nn.Module):
    """A base model with adapters of one method.

    Args:
        model: the base model; it is changed in place.
        peft_config: the configuration of the first adapter, or `{name: configuration}`.
        adapter_name: the adapter to create.
        low_cpu_mem_usage: create its parameters on the meta device, to be filled by loading.
        state_dict: an adapter's tensors; if given, exactly the layers that have tensors in it are adapted.
    """

    prefix: str = ""
    # Attributes that map an adapter's name to a tensor that all its layers share, and have under the same name.
    adapter_layer_names: tuple[str, ...] = ()
    tuner_layer_cls: type[BaseTunerLayer] = BaseTunerLayer
    # Whether layers of other methods may be around and inside of its own.
    mixes = False
    # Kind of op -> class, for methods that do not have one class for all kinds.
    layer_classes: dict[str, type[BaseTunerLayer]] = {}
    target_module_mapping: dict[str, list[str]] = {}
    # target_modules where neither the configuration nor target_module_mapping says any; None: that is an error.
    default_targets: str | None = None

    def __init__(
        self,
        model: nn.Module,
        peft_config,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.merge_errors: dict[str, MergeError] = {}  # of the last merge, by the layer's name; packed weights only
        new = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        new = {name: config.for_model(model) for name, config in new.items()}
        had_config = hasattr(model, "peft_config")
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(f"The model has an adapter {adapter_name!r} already: delete it, or take another name")
        if not had_config:
            model.peft_config = {}
        self.peft_config: dict = model.peft_config  # one dict, of the model, for all its tuners
        self.peft_config.update(new)
        self._active_without_parts = [adapter_name]
        try:
            self.inject_adapter(model, adapter_name, False, low_cpu_mem_usage, state_dict)
            self.set_adapter(adapter_name, inference_mode=self.peft_config[adapter_name].inference_mode)
        except Exception:
            for name in new:
                del self.peft_config[name]
            if not had_config:
                del model.peft_config
            raise

    # What a method may add

    def shared_state(self, config, targets: dict[str, nn.Module], adapter_name: str) -> None:
        """Called once per new adapter with its targets (`{key: base layer}`), before any layer is made."""

    def layer_kwargs(self, config, key: str) -> dict:
        """What `update_layer` gets besides the name and the configuration, for the layer `key`."""
        return {}

    def before_loading(self, adapter_name: str, saved: dict) -> None:
        """Called before a file's tensors are put into an adapter that exists, with the configuration beside them."""

    def add_parts(self, config, adapter_name: str) -> None:
        """Called when all layers have the new adapter, for what it has beside them."""

    def parameter_targets(self, config) -> dict[str, tuple[str, str]]:
        """Bare parameters that the adapter gets in `add_parts`: `{name: (path of the owner, name there)}`."""
        return {}

    def layer_class(self, target: nn.Module, key: str) -> type[BaseTunerLayer]:
        """The class of the adapter layer around `target`.

        Raises:
            ValueError: the method has no layer for this kind of module.
        """
        op = make_op(target)
        classes = self.layer_classes
        if op is None or (classes and op.kind not in classes):
            raise ValueError(
                f"Target module {key} ({type(target).__name__}) is not supported by {type(self).__name__}, which has "
                f"layers for {', '.join(classes or OP_KINDS)}: narrow target_modules or use exclude_modules"
            )
        return classes[op.kind] if classes else self.tuner_layer_cls

    def prepare_config(self, config):
        """Fill in what the configuration leaves to the model (here: the targets)."""
        if config.target_modules is None:
            what = "a list of names, a regular expression, or 'all-linear'"
            mapping, default = self.target_module_mapping, self.default_targets
            targets = usual_modules(self.model, "target_modules", mapping, what, default)
            config.target_modules = targets if isinstance(targets, str) else set(targets)
        config.target_modules = resolve_all_linear(
            self.model,
            config.target_modules,
            lambda module: isinstance(module, BaseTunerLayer),
            self.tuner_layer_cls.folds(),
        )
        return config

    @classmethod
    def targets_of(cls, model: nn.Module, config) -> dict[str, nn.Module]:
        """The targets (`{key: base layer}`) that an adapter with this configuration would get; nothing is changed."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model = model
        config = tuner.prepare_config(copy.copy(config))
        return tuner._without_whole_modules(config, tuner._find_targets(config, None), explicit=False)

    def check_new_config(self, config) -> None:
        """Refuse a configuration that cannot live beside the others."""
        if getattr(config, "bias", "none") != "none" and len(self.peft_config) > 1:
            raise ValueError(
                f"{type(config).__name__} with bias={config.bias!r} trains the base model's biases, which adapters "
                "share: only a model's first and only adapter can do so; use bias='none'"
            )

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Create adapter `adapter_name` (its configuration stands in `peft_config`) in all its targets.

        Raises:
            ValueError: bad name, no default targets, or an unsupported target (one that is never called, too).
            NoMatchingPeftModuleError: the patterns match no module.
        """
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        self.check_new_config(config)
        given = config.target_modules
        if given != DUMMY_TARGET_MODULES:
            config = self.peft_config[adapter_name] = self.prepare_config(config)
        targets = self._find_targets(config, state_dict)
        targets = self._without_whole_modules(config, targets, explicit=given is not None and given != "all-linear")
        self._check_supported(config, targets)
        self._warn_of_names_without_use(config, given, targets)
        for attribute in self.adapter_layer_names:  # one for all layers, also those of the model's earlier tuners
            held = (getattr(layer, attribute) for layer in self.layers() if isinstance(layer, self.tuner_layer_cls))
            setattr(self, attribute, next(held, BufferDict()))
        self.shared_state(config, targets, adapter_name)
        active, disabled = self.active_adapters, self._adapters_disabled
        keep_packed(walk(model), is_trainable=not config.inference_mode)
        shared, places, changes = shared_parameters(model), Places(model), []
        try:
            for key in targets:
                parent, target, target_name = _get_submodules(model, key)
                parent, base = base_of(parent), base_of(target)
                on_meta = low_cpu_mem_usage or home_device(base).type == "meta"
                with torch.device("meta") if on_meta else nullcontext():
                    self._create_and_replace(config, adapter_name, target, target_name, parent, key)
                outer = model.get_submodule(key)
                layer = self._own_layer(outer)
                if outer is not target:
                    keep_called(model, key, layer)
                    places.replace(target, layer)  # a module may stand in more places than the one called `key`
                    layer._active_adapter = list(active)
                    layer.enable_adapters(not disabled)
                # A merged layer has parted from the others for a while.
                layer.op.shared |= not layer.keeps_ties and id(layer.op.weight) in shared
                changes.append(layer.base_change(adapter_name, config))
            wrap_modules_to_save(model, getattr(config, "modules_to_save", None) or [], adapter_name)
            with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                self.add_parts(config, adapter_name)
            _check_biases(model, config, adapter_name)
            for change in filter(None, changes):
                change()
        except Exception:
            self.take_back(adapter_name)
            raise
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *targets]))
        keep_trained_biases(model, self.peft_config)
        self._mark_only_adapters_as_trainable(model)
        for wrapper in self.wrappers():  # new ones know of the new adapter only
            wrapper._active_adapter = active
            wrapper.enable_adapters(not disabled)
        for part in parts(model):  # the adapter waits to be activated, and what the others do is not touched
            part._set_flags(adapter_name, False)
        if autocast_adapter_dtype:
            self._cast_adapter_dtype(adapter_name)

    def _warn_of_names_without_use(self, config, given, targets: dict[str, nn.Module]) -> None:
        """Warn of what the configuration names and the model does not have.

        Not for configurations that were read from a file: they say what was adapted once, and what the file has for
        this model, or lacks, is reported when its tensors are loaded. Nor for the default targets, which are for all
        models of one type and may list what some of them lack.
        """
        if config.from_file:
            return
        warned: list[str] = []
        if _is_transformers_model(self.model):
            from ..utils.transformers_weight_conversion import warn_of_single_experts

            warned = warn_of_single_experts(self.model, config.target_modules)
        default = self.target_module_mapping.get(model_config(self.model).get("model_type", "custom"))
        chosen = not isinstance(given, str) and given is not None and set(given) != set(default or ())
        keys = [key for key, _ in walk(self.model) if key]
        parameters = self.parameter_targets(config)
        # Experts are warned of once.
        useless = unmatched_entries(config, [*keys, *warned], [*targets, *parameters], chosen)
        named = getattr(config, "target_parameters", None) or ()
        if strangers := [name for name in named if not any(name_matches([name], key) for key in parameters)]:
            useless["target_parameters"] = strangers
        if useless:
            listed = "; ".join(f"{field} {entries}" for field, entries in useless.items())
            warn(
                f"{type(config).__name__} names what the model does not have, so that it has no effect: {listed}. The "
                f"adapter has {len(targets)} layers, such as {list(targets)[:3]}",
            )

    def _without_whole_modules(self, config, targets: dict[str, nn.Module], explicit: bool) -> dict[str, nn.Module]:
        """Drop targets that are, or lie in, modules to be trained whole.

        They train anyway: so it is with the linear layers inside a classification head, and so files of upstream mean
        it. Where the user asked for both, `explicit`ly, that is refused.

        Raises:
            ValueError: so it is, or a module to be trained whole contains layers of another adapter.
        """
        names = list(getattr(config, "modules_to_save", None) or [])
        modules = dict(walk(self.model)) if names else {}
        for name in names:
            for whole in keys_ending_in(name, modules):
                below = walk(modules[whole])
                adapted = [f"{whole}.{key}".rstrip(".") for key, module in below if isinstance(module, BaseTunerLayer)]
                inside = [key for key in targets if key == whole or key.startswith(whole + ".")]
                refused = explicit and not config.from_file and name not in TASK_HEAD_NAMES
                if adapted or (inside and refused):
                    raise ValueError(
                        f"{(adapted or inside)[0]} is a target of the adapter and cannot be in modules_to_save as well "
                        f"(modules_to_save={names} means {whole}, which is trained and saved whole): narrow "
                        "target_modules, add it to exclude_modules, or take the name out of modules_to_save"
                    )
                targets = {key: target for key, target in targets.items() if key not in inside}
        return targets

    def _check_supported(self, config, targets: dict[str, nn.Module]) -> None:
        """Refuse targets that the method has no layer for, before it makes anything out of their sizes."""
        for key, target in targets.items():
            check_attention(
                self.model, key, targets, self.tuner_layer_cls.folds(), drops(config) and not config.inference_mode
            )
            if isinstance(target, AuxiliaryTrainingWrapper):
                raise ValueError(
                    f"{key} is trained whole (modules_to_save) and cannot be a target of the adapter as well"
                )
            self.layer_class(target, key)

    def take_back(self, adapter_name: str) -> None:
        """Undo an injection, finished or not: modules that have no other adapter get their old place back."""
        remove_adapter(self.model, adapter_name)

    def _find_targets(self, config, state_dict) -> dict[str, nn.Module]:
        if config.target_modules == DUMMY_TARGET_MODULES:
            return {}
        if state_dict is not None:
            keys = [key.removeprefix("base_model.model.") for key in state_dict]
            wanted = {key[: key.index("." + self.prefix)] for key in keys if "." + self.prefix in key}
            wanted = {key.replace(".base_layer.", ".") for key in wanted}
            wanted -= {owner for owner, _ in self.parameter_targets(config).values()}
        targets: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for key, module in walk(self.model):
            if not key or (inside and key.startswith(inside)):
                continue
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                inside = (*inside, key + ".")
            base = base_of(module)
            is_wanted = key in wanted if state_dict is not None else is_target(config, key)
            if isinstance(base, nn.MultiheadAttention) and self.tuner_layer_cls.folds():
                out, inside = f"{key}.out_proj", (*inside, key + ".")
                along = is_wanted and not name_matches(getattr(config, "exclude_modules", None) or [], out)
                if out in wanted if state_dict is not None else along or is_target(config, out):
                    targets[out] = base_of(base.out_proj)  # first: then it is inside when the attention is replaced
            if is_wanted:
                targets[key] = base
                inside = (*inside, key + ".")
        if not targets and not self.parameter_targets(config):
            raise NoMatchingPeftModuleError(self._no_match_message(config))
        return targets

    def _no_match_message(self, config) -> str:
        if parameters := getattr(config, "target_parameters", None):
            return f"There are no parameters of the base model whose names end in target_parameters={parameters}"
        wanted = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
        names = list(dict.fromkeys(key.rpartition(".")[2] for key, _ in self.model.named_modules() if key))
        examples = [name for name in names if not name.isdigit()][:20]
        fields = ("layers_to_transform", "layers_pattern", "exclude_modules")
        limits = {field: limit for field in fields if (limit := getattr(config, field, None)) is not None}
        named = [key for key, _ in self.model.named_modules() if key and name_matches(config.target_modules, key)]
        numbers = {layer_index(key, getattr(config, "layers_pattern", None)) for key in named}
        return (
            f"Target modules {wanted} not found in the base model"
            + (f" (with {limits})" if limits else "")
            + (f"; without that there are some in the layers {sorted(numbers - {None})}" if numbers - {None} else "")
            + f". The model's module names end in: {', '.join(examples)}"
        )

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key) -> None:
        """Give `target` the adapter, replacing it by an adapter layer unless it is one already."""
        layer = self._own_layer(target)
        if layer is None and isinstance(target, BaseTunerLayer) and not self.mixes:
            raise ValueError(
                f"{current_key} has an adapter of another method ({type(target).__name__}): unload() the first one, "
                "choose other targets, or make the model with get_peft_model(..., mixed=True)"
            )
        if layer is None:
            layer = self.layer_class(base_of(target), current_key)(target)
            layer.train(target.training)
            setattr(parent, target_name, layer)
        for attribute in self.adapter_layer_names:
            setattr(layer, attribute, getattr(self, attribute))
        try:
            layer.update_layer(adapter_name, config, **self.layer_kwargs(config, current_key))
        except ValueError as error:
            raise ValueError(f"Target module {current_key} ({type(base_of(target)).__name__}): {error}") from error
        for child in layer.children():
            if isinstance(child, nn.ModuleDict) and adapter_name in child:
                child[adapter_name].train(layer.training)
        layer._dropping |= {adapter_name} if drops(config) else set()
        self._move_to_base(layer, adapter_name)

    def _own_layer(self, module: nn.Module) -> BaseTunerLayer | None:
        """The layer of this method at a target; of several methods' layers there each is the next one's base layer."""
        own = self.tuner_layer_cls
        while isinstance(module, BaseTunerLayer):
            # AdaLoRA's layers are LoRA's, with other parameters.
            if isinstance(module, own) and (not self.mixes or module.adapter_layer_names == own.adapter_layer_names):
                return module
            if not self.mixes:
                return None
            module = module.base_layer
        return None

    def _move_to_base(self, layer: BaseTunerLayer, adapter_name: str) -> None:
        """Bring a new adapter to its base layer's device and (unless the method has its own) floating-point dtype."""
        base = layer.get_base_layer()
        device, dtype = home_device(base), layer.op.weight.dtype
        for _, parameter in layer.adapter_tensors(adapter_name):
            cast = layer.widens_parameters and parameter.is_floating_point() and not is_quantized(base)
            where = parameter.device if parameter.is_meta else device
            parameter.data = parameter.data.to(where, dtype if cast else None)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze everything that belongs to no adapter (biases that a configuration trains belong to one)."""
        own = {
            id(parameter)
            for part in parts(model)
            if not isinstance(part, BaseTunerLayer)  # `walk` does not come to what these have
            for name in part._available_adapters
            for _, parameter in part.adapter_tensors(name)
        }
        for _, module in walk(model):
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in own:
                    parameter.requires_grad_(False)

    # All layers at once

    def layers(self) -> Iterator[BaseTunerLayer]:
        return (module for _, module in walk(self.model) if isinstance(module, BaseTunerLayer))

    def wrappers(self) -> Iterator[AuxiliaryTrainingWrapper]:
        return (module for _, module in walk(self.model) if isinstance(module, AuxiliaryTrainingWrapper))

    @property
    def active_adapters(self) -> list[str]:
        part = next(modules_with_adapters(self.model), None)
        return list(self._active_without_parts if part is None else part.active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def _adapters_disabled(self) -> bool:
        part = next(modules_with_adapters(self.model), None)
        return part is not None and part.disable_adapters

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active, in this order; see `parts.set_adapter` for what trains.

        Raises:
            ValueError: an adapter that does not exist.
        """
        set_adapter(self.model, adapter_name, inference_mode)
        self._active_without_parts = as_list(adapter_name)

    def _check_known(self, names: Sequence[str]) -> None:
        check_known(names, self.peft_config)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not. A freeze holds, whatever is activated or loaded, until it is taken back."""
        set_requires_grad(self.model, adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool) -> None:
        reshard(self.model)
        for layer in self.layers():
            if not enabled and layer.merged:
                layer.unmerge()
        for module in modules_with_adapters(self.model):
            module.enable_adapters(enabled)

    def enable_adapter_layers(self) -> None:
        self._enable_adapter_layers(True)

    def disable_adapter_layers(self) -> None:
        for name in self.active_adapters:
            if getattr(self.peft_config[name], "bias", "none") != "none":
                warn(
                    f"Adapter {name!r} trains biases of the base model; disabling it does not give the old biases back",
                )
        self._enable_adapter_layers(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from all layers; if it was the only active one, the first that is left becomes active."""
        self._active_without_parts = delete_adapter(self.model, adapter_name)
        del self.peft_config[adapter_name]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (default: the active ones) into the base weights; `unmerge_adapter` undoes it."""
        names = as_list(adapter_names) if adapter_names is not None else self.active_adapters
        self._check_known(names)
        reshard(self.model)
        for layer in self.layers() if safe_merge else ():
            layer.check_merge(names)
        before = [(layer, len(layer.merged_adapters)) for layer in self.layers()]
        try:
            for layer, _ in reversed(before):  # one that is inside of another first
                layer.merge(adapter_names=names)
        except Exception:
            for layer, count in before:
                layer.unmerge_to(count)
            raise
        self._report_merge_errors()

    def _report_merge_errors(self) -> None:
        errors = self.merge_errors = {
            key: layer.merge_error
            for key, layer in self.model.named_modules()
            if isinstance(layer, BaseTunerLayer) and layer.merge_error is not None
        }
        if errors:
            worst = max(errors, key=lambda key: errors[key].of_weight)
            warn(
                f"{len(errors)} merged weights were packed again, which rounds them. The error is "
                f"{MergeError.total(errors.values())}; most in {worst}: {errors[worst]}; all are in merge_errors. "
                "merge_and_unload(dequantize=True) gives an exact model with plain weights"
            )

    def unmerge_adapter(self) -> None:
        reshard(self.model)
        for layer in self.layers():
            layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool | torch.dtype = False,
    ) -> nn.Module:
        """Fold adapters (default: the active ones) into the base weights and give the plain model back.

        Args:
            dequantize: replace all packed weights of the model by plain ones, and fold into these, so that nothing is
                rounded to the packed form again. True: in the type of the model's own plain parameters. A type: all of
                the model gets it.

        Raises:
            TypeError: a packed weight that cannot be rewritten here (give `dequantize`).
        """
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, dequantize)

    def unload(self) -> nn.Module:
        """Give the base model back without its adapters."""
        return self._unload_and_optionally_merge(False)

    def _merge_for_good(self, names: Sequence[str], safe_merge: bool, dequantize: bool | torch.dtype) -> None:
        """Merge before any layer goes: an error leaves the model whole."""
        if not dequantize:
            self.merge_adapter(names, safe_merge)
            return
        merged = list(dict.fromkeys(name for layer in self.layers() for name in layer.merged_adapters))
        if merged:
            self.unmerge_adapter()  # what was merged before is not to be rounded either
        packed = dequantize_layers(self.model, None if dequantize is True else dequantize)
        try:
            self.merge_adapter(list(dict.fromkeys([*merged, *names])), safe_merge)
        except Exception:
            places = Places(self.model)
            for plain, layer in packed.items():
                places.replace(plain, layer)
            raise
        forget_quantization(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool | torch.dtype = False,
    ) -> nn.Module:
        from tqdm import tqdm

        names = as_list(adapter_names) if adapter_names is not None else self.active_adapters
        self._check_known(names)
        if merge:
            self._merge_for_good(names, safe_merge, dequantize)
        drop_trained_biases(self.model)
        reshard(self.model)
        untied, places = False, Places(self.model)
        targets = [*self.layers(), *self.wrappers()]
        for module in tqdm(targets, disable=not progressbar, desc="Unloading" + (" and merging" if merge else "")):
            if isinstance(module, BaseTunerLayer):
                if not merge and module.merged:
                    module.unmerge()
                untied = untied or (module.merged and module.op.is_parted)
                plain = module.base_layer
            else:
                plain = module.unload(names if merge else [])
            places.replace(module, plain)
        if untied and getattr(getattr(self.model, "config", None), "tie_word_embeddings", False):
            self.model.config.tie_word_embeddings = False
            warn(
                "The adapter changed a weight that the model ties to another; the merged model has them apart "
                "(config.tie_word_embeddings is now False)",
            )
        if isinstance(dequantize, torch.dtype):
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(dequantize if parameter.is_floating_point() else None)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return all(layer.supports_lora_conversion(adapter_name) for layer in self.layers())

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet, or unpickling
                raise
        try:
            return getattr(self.model, name)
        except AttributeError:
            if text := explanation(f"peft.PeftModel.{name}"):
                raise AttributeError(text) from None
            raise

    @staticmethod
    def get_model_config(model: nn.Module) -> dict:
        return model_config(model)


def _is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a `PreTrainedModel`; asked by name, since transformers is not to be imported for other models."""
    name = ("transformers.modeling_utils", "PreTrainedModel")
    return any((cls.__module__, cls.__name__) == name for cls in type(model).__mro__)


def _check_biases(model: nn.Module, config, adapter_name: str) -> None:
    """Refuse to train biases that accelerate makes anew for every forward: their gradients would go nowhere."""
    if config.inference_mode or getattr(config, "bias", "none") == "none":
        return
    biases = list(trained_biases(model, config, adapter_name))
    if not biases:
        warn(f"bias={config.bias!r} has no effect: the layers that it means have no biases")
    for name, _ in biases:
        if offload_hook(own_tensor(model, name)[0]) is not None:
            raise ValueError(f"bias={config.bias!r} cannot train {name}, which is off-loaded: use bias='none'")


def wrap_modules_to_save(model: nn.Module, names: Sequence[str], adapter_name: str) -> None:
    """Give every module whose name ends in one of `names` a trainable copy for the adapter.

    Raises:
        ValueError: a name that is no module's. (Classification heads are called `score` or `classifier`, depending on
            the architecture, and the task classes list both: one of them has to be there.)
    """
    wrapped = [name for name in names if _wrap_module_to_save(model, name, adapter_name)]
    heads = set(SEQ_CLS_HEAD_NAMES)
    excused = heads if heads & set(wrapped) else set()
    missing = [name for name in names if name not in wrapped and name not in excused]
    if missing:
        raise ValueError(f"modules_to_save names {missing}, which are no modules of the model")


def _wrap_module_to_save(model: nn.Module, name: str, adapter_name: str) -> bool:
    found = keys_ending_in(name, [key for key, _ in walk(model)])
    for key in found:
        module = model.get_submodule(key)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name)
        else:
            Places(model).replace(module, ModulesToSaveWrapper(module, adapter_name))
    return bool(found)
