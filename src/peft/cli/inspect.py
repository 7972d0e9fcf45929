"""`peft inspect`: the configuration of an adapter or a model, its parameters module by module, and its size.

An adapter's weights are read, and what it changes in each layer is measured. A model's are not: it is built from its
configuration on torch's meta device, so the sizes are those that it has in memory, in the type that the configuration
names. Only `--model` reads the weights of an adapter's base model, to which its changes are then compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.constants import CONFIG_NAME
from .common import LAYER_NUMBER, CliError, first_line, format_bytes, format_table, need, notice
from .models import empty_model, load_adapter, load_model, quiet_transformers
from .report import Delta, by_layer, delta_table, draw_deltas

if TYPE_CHECKING:
    import torch

    from ..tuners.tuners_utils import BaseTunerLayer

METHOD_PARTS = re.compile(r"\.((?:lora|sft|ssf)_[^.]*(?:\.[^.]*)?)$")
"""Where the name of a layer ends and that of its adapter's tensor begins."""

SUMMARY_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "dtype")
"""What is shown of a model's configuration."""


@dataclasses.dataclass
class Line:
    """A line of the table: tensors of one module, or of all layers' modules that are alike."""

    count: int
    shape: str
    numel: int
    size: int
    """In bytes."""


def run(args: argparse.Namespace) -> None:
    """`peft inspect`."""
    quiet_transformers()
    folder = Path(args.path)
    deltas = None
    if (folder / CONFIG_NAME).is_file():
        settings, tensors = read_adapter(folder)
        deltas = read_deltas(folder, args)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise CliError(f"{folder} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json)")
    elif args.model or args.plot:
        raise CliError(f"--model and --plot are for adapters, and {args.path} is none")
    else:
        settings, tensors = read_model(args.path)
    lines = count_parameters(tensors, every_module=args.all)
    rows = [[name, line.count, line.shape, f"{line.numel:,}", format_bytes(line.size)] for name, line in lines.items()]
    print(format_table(list(settings.items())), end="\n\n")
    print(format_table(rows, ["module", "count", "shape", "parameters", "size"], right=(1, 3, 4)), end="\n\n")
    if deltas is not None:
        print(delta_table(deltas if args.all else by_layer(deltas)), end="\n\n")
        if args.plot:
            draw_deltas(deltas, f"{settings['method']} in {folder}", Path(args.plot))
    numel, size = sum(line.numel for line in lines.values()), sum(line.size for line in lines.values())
    print(f"{numel:,} parameters, {format_bytes(size)}")


def read_adapter(folder: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What an adapter's configuration says beyond the defaults, and its tensors by `<layer>.<name>`.

    Raises:
        CliError: the configuration or the weights cannot be read.
    """
    from peft import PeftConfig, load_peft_weights

    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type is None:
            raise ValueError(f"{CONFIG_NAME} has no peft_type")
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CliError(f"cannot read the adapter {folder}: {first_line(error)}") from error
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    settings = {"method": config.peft_type.value, "base model": str(config.base_model_name_or_path)}
    for name, value in config.to_dict().items():
        said = name in ("peft_type", "base_model_name_or_path") or value in (None, {}, [])
        if not said and value != defaults.get(name):
            settings[name] = shorten(value)
    return settings, {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}


def shorten(value: Any) -> str:
    """A setting in one line."""
    if isinstance(value, dict):
        return f"{len(value)} entries"
    if isinstance(value, (list, tuple, set)):
        return ", ".join(dict.fromkeys(LAYER_NUMBER.sub("*", str(item)) for item in sorted(value)))
    return str(getattr(value, "value", value))


def read_model(name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a model's configuration says, and its parameters, which have shapes and types but no content.

    Raises:
        CliError: there is no such model, or it is not a language model.
    """
    model = empty_model(name)
    config = model.config
    settings = {"model": name, "class": type(model).__name__}
    settings |= {key: str(getattr(config, key)) for key in SUMMARY_KEYS if getattr(config, key, None) is not None}
    return settings, dict(model.named_parameters())


def count_parameters(tensors: dict[str, torch.Tensor], every_module: bool) -> dict[str, Line]:
    """Lines of the table, for tensors by their full names; without `every_module` all layers' modules that are alike
    have one, with `*` for the number."""
    lines: dict[str, Line] = {}
    for key, tensor in tensors.items():
        match = METHOD_PARTS.search(key)
        module, part = (key[: match.start()], match[1]) if match else key.rpartition(".")[::2]
        label = f"{module if every_module else LAYER_NUMBER.sub('*', module)} {part}"
        shape = " x ".join(map(str, tensor.shape)) or "1"
        # The positions of sparse deltas are no parameters, but take their space.
        numel = tensor.numel() if tensor.is_floating_point() else 0
        line = lines.setdefault(label, Line(0, shape, 0, 0))
        line.shape = shape if line.shape == shape else "various"
        line.count += 1
        line.numel += numel
        line.size += tensor.numel() * tensor.element_size()
    return lines


# ---- What an adapter changes ----


def read_deltas(folder: Path, args: argparse.Namespace) -> dict[str, Delta] | None:
    """What the adapter does to each module, by the modules' names; None, and a notice why, if that cannot be known.

    Raises:
        CliError: it cannot be known, but `--model` or `--plot` ask for it.
    """
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise need("matplotlib", "--plot")
    try:
        return measure_deltas(folder, args.model)
    except CliError as error:
        if args.model or args.plot:
            raise
        notice(f"what the adapter changes in each layer is not shown: {error} (--model says where the base model is)")
        return None


def measure_deltas(folder: Path, base: str | None) -> dict[str, Delta]:
    """What the adapter does to each module, by the modules' names.

    Args:
        base: the base model, whose weights are then read. None: the one that the adapter names, of which only the
            configuration is read.

    Raises:
        CliError: there is no base model, or the adapter does not fit it.
    """
    from peft import AutoPeftModel, PeftConfig

    from ..tuners.tuners_utils import BaseTunerLayer

    config = PeftConfig.from_pretrained(str(folder))
    try:
        kind = AutoPeftModel.base_class(config)
    except ValueError as error:
        raise CliError(first_line(error)) from error
    if base is None and not config.base_model_name_or_path:
        raise CliError(f"the adapter {folder} names no base model")
    model = load_model(base, "auto", kind) if base else empty_model(config.base_model_name_or_path, kind)
    model = load_adapter(model, str(folder), torch_device="cpu", low_cpu_mem_usage=True)
    return {
        name: measure_delta(layer, model.active_adapter)
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def measure_delta(layer: BaseTunerLayer, adapter: str) -> Delta:
    """What an adapter does to the weight of one layer, which may be on the meta device."""
    import torch

    trained = sum(tensor.numel() for _, tensor in layer.adapter_tensors(adapter) if tensor.is_floating_point())
    weight = layer.op.weight if layer.op.weight.is_meta else layer.op.load()[0]
    with torch.no_grad():
        norms = (
            None if tensor is None or tensor.is_meta else torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
            for tensor in (change_of_weight(layer, adapter, weight), weight)
        )
        return Delta(trained, math.prod(layer.op.stored_shape), *norms)


def change_of_weight(layer: BaseTunerLayer, adapter: str, weight: torch.Tensor) -> torch.Tensor | None:
    """What merging would add to `weight`; None: that cannot be known without its numbers, or there is no merging."""
    from ..tuners.tuners_utils import AdditiveLayer

    if isinstance(layer, AdditiveLayer):
        return layer.delta_weight(adapter)
    if weight.is_meta:
        return None
    wide = weight.double()
    try:
        return layer.fold(adapter, wide, None)[0] - wide
    except TypeError:
        return None
