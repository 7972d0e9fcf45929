"""`peft train`: fine-tune a causal language model on 🤗 Trainer, and measure before and after.

What can be wrong is looked at first: output folder, data, configuration. Then the model is loaded, and only when all
fits together is anything written (see `output.py`).

Not here: a training loop (Trainer's is used, hence `accelerate launch` and `torchrun` work), and models that do not fit
on one device.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .arguments import TASK_PREFIX
from .common import NotFinite, notice
from .data import Collator, check_packing, pack, pad_id_of
from .evaluate import Measure, measure, read_metrics
from .models import add_adapter, load_model, load_tokenizer, make_adapter_config, quiet_transformers, resolve_dtype
from .output import Output
from .report import draw_curve, summary, write_metrics
from .source import Source, read_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from ..peft_model import PeftModel
    from .progress import Progress

LEARNING_RATES = {"sft": 2e-3, "sm3": 1e-2, "lora": 1e-3, "ssf": 5e-3}
"""Defaults of --lr: by method, and for SFT with the SM3 optimiser, whose steps have another unit."""

WARMUP = 0.05
"""Share of the update steps in which the learning rate rises; then it falls linearly to zero."""

CURVE_POINTS = 500
SAMPLES = 5
"""Number of held-out problems whose replies are written to metrics.json."""


def run(args: argparse.Namespace) -> None:
    """`peft train`."""
    fill_in_defaults(args)
    output = Output(Path(args.output), args.resume, args.overwrite)
    source = read_source(args)
    output.check_same_run(args, source)
    if output.finished:
        notice(f"the run in {output.folder} is finished; there is nothing to resume")
        print(summary(read_metrics(output.folder), output.folder))
        return
    config = make_adapter_config(args)

    import transformers
    from accelerate.utils import gather_object

    quiet_transformers()
    tokenizer = load_tokenizer(args.model)
    source.tokenize(tokenizer, args.max_length, args.loss_on)
    base = load_model(args.model, resolve_dtype(args.dtype), quantize=args.quantize)
    source.check_fit(base)
    if args.gradient_checkpointing:
        from ..utils.other import enable_checkpointing

        enable_checkpointing(base, {"use_reentrant": False})
    transformers.set_seed(args.seed)  # from here come SFT's first positions and LoRA's A
    model = add_adapter(base, config)
    if args.packing:
        check_packing(base)  # with an adapter: else bitsandbytes may repack 4-bit weights for inference
    training_args = make_training_args(args, output)
    for digest in gather_object([source.digest]):
        source.check_digest(digest, "the processes of this run do not have the same data")
    with output.writing(args, source.digest, training_args):
        metrics = train(args, model, tokenizer, source, training_args, output)
    if training_args.process_index == 0:
        print(summary(metrics, output.folder))


def fill_in_defaults(args: argparse.Namespace) -> None:
    """Give a value to the options whose default depends on others."""
    if args.lr is None:
        args.lr = LEARNING_RATES["sm3" if args.selection_algorithm == "sm3" else args.method]
    if args.epochs is None and args.max_steps is None:
        args.epochs = 1.0 if args.data.startswith(TASK_PREFIX) else 3.0


def make_training_args(args: argparse.Namespace, output: Output) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    training_args = TrainingArguments(
        output_dir=str(output.checkpoints),
        num_train_epochs=args.epochs or 1.0,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.lr,
        warmup_steps=WARMUP,
        save_strategy="steps",
        save_steps=args.save_steps or 0.25,  # a share of the run
        save_total_limit=2,
        logging_steps=1 / CURVE_POINTS,
        logging_nan_inf_filter=False,  # Progress must see them
        include_num_input_tokens_seen="all" if args.packing else "non_padding",
        seed=args.seed,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),  # else several processes on CPUs do not find each other
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    if training_args.n_gpu > 1:  # Trainer would drive all of them from this process by nn.DataParallel
        notice(
            f"one of {training_args.n_gpu} GPUs is used; for all of them start with torchrun --nproc-per-node "
            f"{training_args.n_gpu} -m peft train ..."
        )
        training_args._n_gpu = 1
    return training_args


def train(
    args: argparse.Namespace,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    training_args: TrainingArguments,
    output: Output,
) -> dict[str, Any]:
    """Measure, train, measure, write the results; returns what goes into metrics.json."""
    from transformers import PrinterCallback, Trainer

    from peft import SftTrainer

    from .progress import Progress

    progress, examples = Progress(), source.train_examples
    if args.packing:
        examples = pack(examples, args.max_length)
        notice(f"packed {len(source.train_examples)} examples into {len(examples)} sequences")
    trainer = (SftTrainer(Trainer) if args.method == "sft" else Trainer)(
        model=model,
        args=training_args,
        train_dataset=examples,
        data_collator=Collator(pad_id_of(tokenizer)),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    if output.before is None:
        notice(f"measuring on {len(source.held_out_examples)} held-out examples before training")
        with model.disable_adapter():
            output.keep_before(measure(model, tokenizer, source, args.batch_size))
    before = output.before
    notice(f"held-out {before.metric} before training: {before}")
    try:
        trainer.train(resume_from_checkpoint=output.last_checkpoint)
    finally:
        progress.close()
    if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
        raise NotFinite("training diverged: its last step has left weights that are no finite numbers; lower --lr")
    notice(f"measuring on {len(source.held_out_examples)} held-out examples after training")
    try:
        after = measure(model, tokenizer, source, args.batch_size)
    except NotFinite as error:
        raise NotFinite(f"training diverged: {error}; lower --lr") from error

    metrics = collect_metrics(source, trainer, progress, before, after) | output.identity(args, source.digest)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    title = f"{args.method} on {Path(args.data).name}: held-out {before.metric} {before} → {after}"
    if training_args.process_index == 0:
        with output.results() as folder:
            model.save_pretrained(folder)
            write_metrics(metrics, folder)
            draw_curve(losses, title, folder)
    return metrics


def collect_metrics(
    source: Source, trainer: Trainer, progress: Progress, before: Measure, after: Measure
) -> dict[str, Any]:
    """What has been measured, in the form of metrics.json."""
    trained, total = trainer.model.get_nb_trainable_parameters()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        "peft_version": __version__,
        "metric": before.metric,
        "before": before.value,
        "after": after.value,
        "steps": trainer.state.global_step,
        "resumed_from_step": progress.first_step,
        "train_seconds": progress.seconds,
        "tokens_per_second": progress.tokens_per_second,
        "tokens": trainer.state.num_input_tokens_seen,
        "last_train_loss": losses[-1] if losses else None,
        "trainable_parameters": trained,
        "total_parameters": total,
        "train_examples": len(source.train_examples),
        "held_out_examples": len(source.held_out_examples),
    }
    if source.task:
        metrics["samples"] = [
            {"question": problem["question"], "answer": problem["answer"], "before": reply, "after": later}
            for problem, reply, later in zip(source.held_out[:SAMPLES], before.replies, after.replies)
        ]
    return metrics
