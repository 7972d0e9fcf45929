"""`peft memory`: how much memory training takes, from the model's configuration alone; see `peft.estimate_memory`."""

from __future__ import annotations

import argparse
import inspect
from typing import TYPE_CHECKING

from .arguments import ALL_LINEAR, METHODS
from .common import CliError, first_line
from .models import load_config, make_adapter_config, quiet_transformers

if TYPE_CHECKING:
    from ..config import PeftConfig


def run(args: argparse.Namespace) -> None:
    """`peft memory`."""
    from peft import estimate_memory

    quiet_transformers()
    model = load_config(args.model)
    own = set(inspect.signature(estimate_memory).parameters) - {"model"}
    settings = {name: value for name, value in vars(args).items() if name in own}
    adapter = None
    if args.method != "full":
        adapter = _adapter_config(args)
        adapter.task_type = args.task_type or ("SEQ_2_SEQ_LM" if model.is_encoder_decoder else "CAUSAL_LM")
    try:
        estimate = estimate_memory(model, adapter, gradient_accumulation=args.grad_accum > 1, **settings)
    except (ValueError, NotImplementedError) as error:
        raise CliError(first_line(error)) from error
    print(estimate)


def _adapter_config(args: argparse.Namespace) -> PeftConfig:
    """The adapter; of a method without options here, what --adapter-args says and its defaults.

    Raises:
        CliError: there is no such method, or it refuses what it is given.
    """
    if args.method in METHODS:
        args.target_modules = args.target_modules or ALL_LINEAR
        return make_adapter_config(args)
    from ..mapping import config_class

    fields = dict(args.adapter_args or {})
    if args.target_modules is not None:
        fields["target_modules"] = args.target_modules
    try:
        return config_class(args.method.upper())(**fields)
    except (KeyError, ValueError, TypeError) as error:
        raise CliError(f"--method {args.method}: {first_line(error)}") from error
