"""`peft memory`: how much memory training takes, from the model's configuration alone; see `peft.estimate_memory`."""

from __future__ import annotations

import argparse

from .arguments import ALL_LINEAR
from .common import CliError, first_line
from .models import load_config, make_adapter_config, quiet_transformers


def run(args: argparse.Namespace) -> None:
    """`peft memory`."""
    from peft import estimate_memory

    quiet_transformers()
    model = load_config(args.model)
    adapter = None
    if args.method != "full":
        args.target_modules = args.target_modules or ALL_LINEAR
        adapter = make_adapter_config(args)
        adapter.task_type = args.task
    try:
        estimate = estimate_memory(
            model,
            adapter,
            batch_size=args.batch,
            sequence_length=args.seq,
            task_type=args.task,
            dtype=args.dtype,
            mixed_precision=args.mixed_precision,
            quantization=args.quantize,
            optimizer=args.optimizer,
            gradient_checkpointing=args.checkpointing,
            gradient_accumulation=args.grad_accum > 1,
            padding=args.padding,
            device=args.device,
            num_gpus=args.gpus,
            sharding=args.sharding,
            offload=args.offload,
        )
    except (ValueError, NotImplementedError) as error:
        raise CliError(first_line(error)) from error
    print(estimate)
