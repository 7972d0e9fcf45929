"""Sparse fine-tuning with the 🤗 Trainer: SftConfig and SftTrainer.

    python examples/sft_trainer.py --steps 40

The task, the model and the options are those of `examples/sft_custom_loop.py`.
"""

from __future__ import annotations

import tempfile

from sft_custom_loop import additions, collate, held_out_loss, prepare
from transformers import Trainer, TrainingArguments

from peft import SftTrainer


def main(arguments: list[str] | None = None) -> None:
    args, model, tokenizer, config = prepare(arguments, __doc__.splitlines()[0])
    print(f"held-out loss before: {held_out_loss(model, tokenizer):.4f}")

    trainer_cls = SftTrainer(Trainer)  # Trainer or any subclass of it
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = trainer_cls(
            model=model,
            args=TrainingArguments(
                checkpoints,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                learning_rate=args.learning_rate,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=additions(tokenizer, 2000, seed=0),
            data_collator=collate,
            sft_config=config,
        )
        trainer.train()
    for entry in trainer.sft_selector.history:
        print(f"reselected after step {entry['step']}: {entry['moved']:,} of {entry['total']:,} positions")

    model.to("cpu")
    print(f"held-out loss after: {held_out_loss(model, tokenizer):.4f}")
    if args.output:
        model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
