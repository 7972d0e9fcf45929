"""Sparse fine-tuning (SFT, "SpIEL", arXiv 2401.16405): k chosen weights are trained, and re-chosen while training."""

from ..._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "SftAdamW": "peft.tuners.sft.optimizer",
        "SftArguments": "peft.tuners.sft.config",
        "SftConfig": "peft.tuners.sft.config",
        "SftLayer": "peft.tuners.sft.layer",
        "SftModel": "peft.tuners.sft.model",
        "SftSM3": "peft.tuners.sft.optimizer",
        "SftSelector": "peft.tuners.sft.selector",
        "SftTrainer": "peft.tuners.sft.trainer",
        "SparseDelta": "peft.tuners.sft.layer",
        "select_static": "peft.tuners.sft.static",
    },
)
