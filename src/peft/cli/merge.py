"""`peft merge`: fold an adapter into its base model and write an ordinary model of transformers, with its tokenizer."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.constants import CONFIG_NAME
from .common import CliError, beside, first_line, format_bytes, give_usual_modes, notice
from .models import check_name, load_adapter, load_model, load_tokenizer, quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BIAS_SWITCHES = ("attention_bias", "mlp_bias", "use_bias")
"""What transformers' configurations call the biases of linear layers."""


def run(args: argparse.Namespace) -> None:
    """`peft merge`."""
    output, adapter = Path(args.output), Path(args.adapter)
    check_paths(output, adapter, args.overwrite)

    import torch

    quiet_transformers()
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    tokenizer = load_tokenizer(args.base)
    model = load_adapter(load_model(args.base, dtype), args.adapter)
    try:
        merged = model.merge_and_unload(safe_merge=True, dequantize=True)
    except (ValueError, NotImplementedError) as error:
        raise CliError(f"cannot merge {args.adapter} into {args.base}: {first_line(error)}") from error
    make_room_for_biases(merged)
    with beside(output) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        give_usual_modes(temporary)
        put_in_place(temporary, output)
    notice(f"wrote {output}, {format_bytes(size)}")


def check_paths(output: Path, adapter: Path, overwrite: bool) -> None:
    """Raise CliError if there is no adapter, or the output is not free."""
    check_name(str(adapter), "load the adapter")
    if adapter.is_dir() and not (adapter / CONFIG_NAME).is_file():
        raise CliError(f"{adapter} is not an adapter: it has no {CONFIG_NAME}")
    if output.exists() and not output.is_dir():
        raise CliError(f"--output {output} is a file; it must be a folder, or not exist")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CliError(f"--output {output} is not empty; --overwrite replaces what is in it")
    if adapter.exists() and output.resolve() in (adapter.resolve(), *adapter.resolve().parents):
        raise CliError(f"--output {output} would replace the adapter {adapter}")


def make_room_for_biases(model: PreTrainedModel) -> None:
    """Let the configuration describe the biases that merging has given to layers without (SSF does).

    A file of the model would else load without them. Many architectures have a switch, which gives biases to further
    layers as well; those are zeros.

    Raises:
        CliError: the architecture has no place for them.
    """
    import torch
    from torch import nn

    new = set(model.state_dict()) - set(empty_copy(model))
    if not new:
        return
    for switch in BIAS_SWITCHES:
        if getattr(model.config, switch, None) is False:
            setattr(model.config, switch, True)
    described = empty_copy(model)
    homeless = sorted(new - set(described))
    if homeless:
        raise CliError(
            f"merged, {type(model).__name__} would have {len(homeless)} biases that it has no place for in its files, "
            f"such as {homeless[0]}; use the adapter without merging it"
        )
    for name in set(described) - set(model.state_dict()):
        layer, _, parameter = name.rpartition(".")
        like = model.get_parameter(f"{layer}.weight")
        zeros = torch.zeros(described[name].shape, dtype=like.dtype, device=like.device)
        model.get_submodule(layer).register_parameter(parameter, nn.Parameter(zeros))


def empty_copy(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a model of this configuration consists of, by name and without content."""
    import torch

    with torch.device("meta"):
        return type(model)(model.config).state_dict()


def put_in_place(temporary: Path, output: Path) -> None:
    """Rename a finished folder to `output`; what is there goes only when the new one is."""
    old = None
    if output.exists():
        old = temporary.with_name(temporary.name + ".old")
        os.replace(output, old)
    os.replace(temporary, output)
    if old is not None:
        shutil.rmtree(old)
