"""The methods, one package or module each, on one shared core (`ops`, `tuners_utils`, `base`)."""

from .._lazy import attach
from .._names import TABLE

__getattr__, __dir__, __all__ = attach(
    __name__,
    {name: f"peft{module}" for name, module in TABLE.items() if module.startswith(".tuners.")},
    (
        "adalora", "adaption_prompt", "base", "boft", "bottleneck", "cpt", "denas", "ia3", "ln_tuning", "loha", "lokr",
        "lora", "lycoris_utils", "multitask_prompt_tuning", "oft", "ops", "p_tuning", "parts", "prefix_tuning",
        "prompt_tuning", "sft", "ssf", "targeting", "trainable_tokens", "tuners_utils", "vera",
    ),
)  # fmt: skip
