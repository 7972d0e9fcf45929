"""`peft inspect`: the configuration of an adapter or a model, its parameters module by module, and its size.

An adapter's weights are read. A model's are not: it is built from its configuration on torch's meta device, so the
sizes are those that it has in memory, in the type that the configuration names.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.constants import CONFIG_NAME
from .common import CliError, first_line, format_bytes, format_table
from .models import load_config, quiet_transformers

if TYPE_CHECKING:
    import torch

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
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
    if (folder / CONFIG_NAME).is_file():
        settings, tensors = read_adapter(folder)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise CliError(f"{folder} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json)")
    else:
        settings, tensors = read_model(args.path)
    lines = count_parameters(tensors, every_module=args.all)
    rows = [[name, line.count, line.shape, f"{line.numel:,}", format_bytes(line.size)] for name, line in lines.items()]
    print(format_table(list(settings.items())), end="\n\n")
    print(format_table(rows, ["module", "count", "shape", "parameters", "size"], right=(1, 3, 4)), end="\n\n")
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
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    except ValueError as error:
        raise CliError(f"{name} is no causal language model: {first_line(error)}") from error
    settings = {"model": name, "class": type(model).__name__}
    settings |= {key: str(getattr(config, key)) for key in SUMMARY_KEYS if getattr(config, key, None) is not None}
    return settings, dict(model.named_parameters())


def count_parameters(tensors: dict[str, torch.Tensor], every_module: bool) -> dict[str, Line]:
    """Lines of the table by what they are called.

    Args:
        tensors: by their full names.
        every_module: a line for each module; else one for all layers' modules that are alike, with `*` for the number.
    """
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
