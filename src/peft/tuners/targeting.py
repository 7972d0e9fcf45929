"""Which modules of a model a configuration names, and which entry of a per-layer pattern applies to one.

Pure functions over module names; nothing here changes a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from .ops import OutProjectionOp, make_op

TASK_HEAD_NAMES = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
SHORTEN_FROM = 20  # upstream's number: configurations that mean the same layers are then the same


def name_matches(patterns: str | Sequence[str], key: str) -> bool:
    """Whether module `key` is meant: a string is a regular expression for the whole key, a list names key endings.

    Raises:
        ValueError: the expression is not valid.
    """
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, key) is not None
        except re.error as error:
            raise ValueError(f"target_modules={patterns!r} is not a valid regular expression: {error}") from error
    return any(key == pattern or key.endswith("." + pattern) for pattern in patterns)


def model_config(model: nn.Module) -> dict:
    """The configuration of a base model as a dict; `{"model_type": "custom"}` for one without."""
    config = getattr(model, "config", None)
    if config is None:
        return {"model_type": "custom"}
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return config if isinstance(config, dict) else vars(config)


def usual_modules(
    model: nn.Module, field: str, mapping: dict[str, list[str]], what: str, default: str | None = None
) -> list[str] | str:
    """What `mapping` has for the model's type, to be the value of the configuration's `field`.

    Raises:
        ValueError: it has nothing, and there is no `default`; `what` says what to give.
    """
    model_type = model_config(model).get("model_type", "custom")
    modules = mapping.get(model_type, default)
    if modules is None:
        raise ValueError(
            f"No default {field} for model type {model_type!r}: give `{field}` in the configuration ({what})"
        )
    return modules


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first of `pattern_keys` (regular expressions for the end of a module name) that fits; else the name itself.

    A pattern fits the whole name or what stands after a dot.
    """
    for pattern in pattern_keys:
        if re.fullmatch(rf"(.*\.)?({pattern})", key_to_match):
            return pattern
    return key_to_match


def for_module(key: str, pattern: dict, default):
    """The value of a pattern's first entry that fits module `key`, or else the default."""
    return pattern.get(get_pattern_key(pattern, key), default)


def pattern_key(config, key: str) -> str:
    """The name by which patterns of ranks mean a target: an attention's `out_proj` goes along with it, as in files."""
    owner, _, name = key.replace(".base_layer", "").rpartition(".")
    return owner if name == "out_proj" and is_target(config, owner) else key


def layer_index(key: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of the layer that `key` belongs to.

    It is the first number after a name, or, with `layers_pattern`, the first number directly after such a name:
    `model.layers.3.mlp` is in layer 3 (`layers_pattern` None or "layers"). None: the module is in no numbered layer.
    """
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    parts = key.split(".")
    for name, number in zip(parts, parts[1:]):
        if number.isdigit() and (not names or name in names):
            return int(number)
    return None


def is_target(config, key: str) -> bool:
    """Whether `config` (target_modules, exclude_modules, layers_to_transform, layers_pattern) means module `key`."""
    excluded = getattr(config, "exclude_modules", None)
    if excluded and name_matches(excluded, key):
        return False
    if not config.target_modules or not name_matches(config.target_modules, key):
        return False
    layers = getattr(config, "layers_to_transform", None)
    if layers is None:
        return True
    index = layer_index(key, getattr(config, "layers_pattern", None))
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def keys_ending_in(name: str, keys: Iterable[str]) -> list[str]:
    """Modules that `modules_to_save` means by `name`, without what adapters have made of them."""
    return [
        key
        for key in keys
        if name_matches([name], key) and ".modules_to_save." not in key and ".original_module" not in key
    ]


def unmatched_entries(
    config, keys: Iterable[str], targets: Iterable[str], check_targets: bool = True
) -> dict[str, list]:
    """What a configuration names and the model does not have: `{field: entries}`, without fields that are in order.

    Args:
        keys: names of all modules of the model.
        targets: names of those that the adapter gets.
        check_targets: whether to look at target_modules (a list of defaults is for all models of a type).
    """
    keys = [key.replace(".base_layer", "").replace(".original_module", "") for key in keys]

    def strangers(field: str, keys: Iterable[str]) -> list[str]:
        """Entries of a field's list, or its whole expression, that no module has."""
        patterns = getattr(config, field, None)
        entries = [patterns] if isinstance(patterns, str) else [[entry] for entry in sorted(patterns or ())]
        useless = [entry for entry in entries if entry and not any(name_matches(entry, key) for key in keys)]
        return [entry if isinstance(entry, str) else entry[0] for entry in useless]

    found = {"exclude_modules": strangers("exclude_modules", keys)}
    if check_targets:
        found["target_modules"] = strangers("target_modules", keys)
    found["feedforward_modules"] = strangers("feedforward_modules", targets)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field, None) or {}
        found[field] = [
            p for p in patterns if all(get_pattern_key([p], pattern_key(config, key)) != p for key in targets)
        ]
    layers, pattern = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
    if layers is not None:
        named = [key for key in keys if name_matches(config.target_modules, key)]
        numbers = {layer_index(key, pattern) for key in named}
        wanted = [layers] if isinstance(layers, int) else layers
        found["layers_to_transform"] = [number for number in wanted if number not in numbers]
        names = [pattern] if isinstance(pattern, str) else sorted(pattern or ())
        found["layers_pattern"] = [name for name in names if all(layer_index(key, name) is None for key in named)]
    return {field: entries for field, entries in found.items() if entries}


def keep_called(model: nn.Module, key: str, layer: nn.Module) -> None:
    """Keep torch from taking the weights of a transformer layer's parts, among them `layer`, and calling none of them.

    In evaluation it does that (the "fast path"), unless one of the parts has a hook.
    """
    parent = model.get_submodule(key.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_do_nothing)
        for encoder in model.modules():
            # It would hand its layers nested tensors, which nothing but the fast path takes.
            if isinstance(encoder, nn.TransformerEncoder) and parent in set(encoder.layers):
                encoder.use_nested_tensor = False


def _do_nothing(layer: nn.Module, args: tuple) -> None:
    pass


def output_head_names(model: nn.Module) -> set[str]:
    """Names of the modules that map to the vocabulary or to the classes."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    names = {name for name, module in model.named_modules() if head is not None and module is head}
    if type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
        names |= {name for name, _ in model.named_modules() if name.rpartition(".")[2] in SEQ_CLS_HEAD_NAMES}
    if type(model).__name__.endswith("ForQuestionAnswering"):
        names |= {name for name, _ in model.named_modules() if name.rpartition(".")[2] == "qa_outputs"}
    return names


def shortest_endings(names: set[str], others: set[str]) -> set[str]:
    """Endings that fit every one of `names` and, as far as endings can tell them apart, none of `others`."""
    taken = {ending for other in others for ending in _endings(other)}
    return {next((ending for ending in _endings(name) if ending not in taken), name) for name in names}


def _endings(key: str) -> list[str]:
    """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def resolve_all_linear(model: nn.Module, target_modules, is_adapter_layer=lambda module: False, read: bool = True):
    """Replace `"all-linear"` by names that mean every linear layer of the backbone (the heads left out).

    An attention of torch is one (not if `read` is False); its `out_proj` goes along with it. A layer that already
    carries an adapter counts by its base layer. From `SHORTEN_FROM` layers on the names are endings such as `q_proj`,
    below they are whole.
    """
    if not (isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return target_modules
    heads = output_head_names(model)
    names = set()
    for name, module in model.named_modules():
        adapted = is_adapter_layer(module)
        op = make_op(module.get_base_layer() if adapted else module)
        if name in heads or op is None or op.kind != "Linear" or isinstance(op, OutProjectionOp):
            continue
        if read or not op.is_read:
            names.add(name)
    inside = {name for name in names for outer in names if name != outer and name.startswith(outer + ".")}
    names -= inside
    if len(names) < SHORTEN_FROM:
        return names
    return shortest_endings(names, {name for name, _ in model.named_modules() if name} - names)
