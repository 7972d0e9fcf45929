"""`SftTrainer`: makes sparse fine-tuning work with any subclass of the 🤗 Trainer.

`SftTrainer(Base)` is `Base` plus what sparse fine-tuning adds to training: its own optimiser, a selector that is
stepped after every update step, and a file in every checkpoint so that a run can be resumed at any step. It supports
what the Trainer does with one device or data parallelism; strategies that partition parameters (DeepSpeed, FSDP) are
refused by the selector, since positions cannot be exchanged in parameters that nobody holds whole.
"""

from __future__ import annotations

import copyreg
import functools
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...config import write_atomically
from ...utils.warning import PeftWarning
from .config import SftConfig
from .optimizer import SftAdamW, SftSM3
from .selector import SftSelector, named_deltas

if TYPE_CHECKING:
    from transformers import Trainer

SELECTOR_NAME = "sft_selector.safetensors"
"""File of the selector's state in a checkpoint folder."""

PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Values of `TrainingArguments.optim` that ask for nothing but AdamW, one of which is the default."""


@functools.cache
def SftTrainer(base: type[Trainer]) -> type[Trainer]:
    """Make a Trainer class for sparse fine-tuning.

    The class is called `Sft<base>`, is made once per base class, can be pickled, and takes two more keyword arguments:
    `sft_config`, by default the configuration of the model's active adapter, and `log_sft_layers`. Learning rate,
    weight decay, and for "rigl" the betas and epsilon of AdamW, come from the TrainingArguments; the moments are kept
    in float32. To set anything else, pass an optimiser: `optimizers=(SftSM3(...), None)`.

    Reselections are logged with the next training log, so every logger of the Trainer gets them: `sft_moved`, the
    positions exchanged since the previous log, and with `log_sft_layers=True` also `sft_moved/<layer>` for each layer.

    Args:
        base: `transformers.Trainer` or a subclass.

    Raises:
        TypeError: `base` is not a Trainer class.
    """
    from transformers import Trainer

    if not (isinstance(base, type) and issubclass(base, Trainer)):
        raise TypeError(f"SftTrainer takes transformers.Trainer or a subclass of it, got {base!r}")
    if issubclass(base, SftTrainerMixin):
        return base
    return _metaclass(type(base))(f"Sft{base.__name__}", (SftTrainerMixin, base), {"sft_base": base})


class SftTrainerMixin:
    """What `SftTrainer(Base)` adds to `Base`."""

    sft_base: type[Trainer]
    """The class that was handed to `SftTrainer`."""

    def __init__(
        self, *args: Any, sft_config: SftConfig | None = None, log_sft_layers: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sft_config = _resolve_config(self.model) if sft_config is None else sft_config
        self.sft_selector: SftSelector | None = None
        self._sft_checkpoint: str | None = None
        self.log_sft_layers = log_sft_layers
        self._sft_logged = 0
        _check_config(self.sft_config)
        named_deltas(self.model)
        self._check_optimizer_settings()
        if self.args.n_gpu > 1:
            raise ValueError(
                f"This process drives {self.args.n_gpu} devices through nn.DataParallel, whose replicas cannot gather "
                f"gradients; start one process per device with `accelerate launch` or `torchrun`, or show it one device"
            )
        self.add_callback(_callback_class()(self))

    # ---- Optimiser ----

    def _check_optimizer_settings(self) -> None:
        """Refuse, before anything is spent on training, what would be ignored or could not work."""
        algorithm = self.sft_config.selection_algorithm
        needed = SftSM3 if algorithm == "sm3" else SftAdamW
        given = type(self.optimizer) if self.optimizer is not None else None
        if self.optimizer_cls_and_kwargs is not None:
            given = self.optimizer_cls_and_kwargs[0]
        if given is not None:
            if not (isinstance(given, type) and issubclass(given, needed)):
                raise ValueError(
                    f"selection_algorithm={algorithm!r} needs the optimizer {needed.__name__}, got {given!r}; leave it "
                    f"to the trainer, or pass one of that class"
                )
            return
        if self.args.optim not in PLAIN_OPTIMIZERS:
            raise ValueError(
                f"optim={self.args.optim.value!r} cannot be combined with sparse fine-tuning, which needs "
                f"{needed.__name__}; leave `optim` at its default"
            )
        if self.args.optim_args:
            raise ValueError(
                f"optim_args={self.args.optim_args!r} has no meaning for {needed.__name__}; pass "
                f"optimizers=({needed.__name__}(...), None) instead"
            )
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        if algorithm == "sm3" and betas != (0.9, 0.999):
            raise ValueError(
                f"adam_beta1={betas[0]} and adam_beta2={betas[1]} have no meaning for SftSM3; for momentum pass "
                f"optimizers=(SftSM3(..., momentum=...), None)"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser that the selection algorithm needs, unless the user brought one."""
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(model))
        trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        groups = [
            {
                "params": [param for name, param in trained.items() if name in decaying],
                "weight_decay": self.args.weight_decay,
            },
            {"params": [param for name, param in trained.items() if name not in decaying], "weight_decay": 0.0},
        ]
        args = self.args
        if self.sft_config.selection_algorithm == "sm3":
            deltas = {delta.values: delta for delta in named_deltas(model).values()}
            self.optimizer = SftSM3(groups, deltas, lr=args.learning_rate, eps=args.adam_epsilon)
        else:
            self.optimizer = SftAdamW(
                groups,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                momentum_dtype=torch.float32,
            )
        return self.optimizer

    # ---- Selection ----

    def start_sft_selection(self) -> None:
        """Make the selector of the coming training, in the state of the checkpoint that is being resumed, if any."""
        self.stop_sft_selection()
        self.sft_selector = SftSelector(
            self.model,
            self.optimizer,
            self.sft_config,
            total_update_steps=self.state.max_steps,
            grad_accumulation_steps=self.args.gradient_accumulation_steps,
            completed_steps=self.state.global_step,
        )
        self._sft_logged = 0
        checkpoint, self._sft_checkpoint = self._sft_checkpoint, None
        if checkpoint is not None:
            self._load_selector(checkpoint)

    def stop_sft_selection(self) -> None:
        """Stop gathering gradients; the report of the last selector stays readable."""
        if self.sft_selector is not None:
            self.sft_selector.close()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the base class does, with what has been reselected since the previous training log."""
        if self.sft_selector is not None and not any(key.startswith("eval_") for key in logs):
            pending = self.sft_selector.history[self._sft_logged :]
            if pending:
                self._sft_logged += len(pending)
                # In place, as the Trainer adds the epoch: it returns some of these dicts to the user.
                logs["sft_moved"] = sum(entry["moved"] for entry in pending)
                for name, moved in (item for entry in pending for item in entry["layers"].items()):
                    if self.log_sft_layers:
                        key = f"sft_moved/{name.rpartition('.sft_delta.')[0]}"
                        logs[key] = logs.get(key, 0) + moved
        super().log(logs, *args, **kwargs)

    # ---- Checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.sft_selector is not None:
            from safetensors.torch import save_file

            state = {key: tensor.cpu() for key, tensor in self.sft_selector.state_dict().items()}
            write_atomically(os.path.join(output_dir, SELECTOR_NAME), lambda path: save_file(state, path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The selector itself is made when training begins, after the optimiser and the step count are known.
        self._sft_checkpoint = checkpoint

    def _load_selector(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, SELECTOR_NAME)
        if not os.path.isfile(path):
            warnings.warn(
                f"{checkpoint} has no {SELECTOR_NAME}: gradients gathered before it was saved are lost, so training "
                f"will not continue exactly as it would have",
                PeftWarning,
                stacklevel=2,
            )
            return
        from safetensors.torch import load_file

        state = load_file(path)
        saved_step = int(state.get("completed_steps", -1))
        if saved_step != self.state.global_step:
            raise ValueError(
                f"{path} was saved after {saved_step} update steps, but the checkpoint after {self.state.global_step}"
            )
        self.sft_selector.load_state_dict(state)


def _resolve_config(model: nn.Module) -> Any:
    """The configuration of the model's active adapter, of the SFT one if several are active, or None."""
    from ...peft_model import PeftModel

    if not isinstance(model, PeftModel):
        return None
    configs = [model.peft_config[name] for name in model.active_adapters]
    return next((config for config in configs if isinstance(config, SftConfig)), next(iter(configs), None))


def _check_config(config: Any) -> None:
    if config is None:
        raise ValueError(
            "The model has no adapter to take `sft_config` from; make one with get_peft_model(model, SftConfig(...)) "
            "before the trainer"
        )
    if not isinstance(config, SftConfig):
        raise TypeError(f"SftTrainer needs an SftConfig, got {type(config).__name__}")


# ---- Classes that can only be made once transformers is there ----


class _SftTrainerType(type):
    """Metaclass of the trainers, by which pickle recognises them: they are not attributes of any module."""


@functools.cache
def _metaclass(base: type) -> type:
    """`_SftTrainerType` on top of the metaclass of the base class, registered with pickle."""
    metaclass = _SftTrainerType if base is type else type("_SftTrainerType", (_SftTrainerType, base), {})
    copyreg.pickle(metaclass, _reduce_trainer_class)
    return metaclass


def _reduce_trainer_class(cls: type) -> str | tuple:
    if "sft_base" in vars(cls):
        return SftTrainer, (cls.sft_base,)
    return cls.__qualname__  # a user's subclass, found by its name


@functools.cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class SftCallback(TrainerCallback):
        """Drives the selector of a trainer."""

        def __init__(self, trainer: SftTrainerMixin) -> None:
            self.trainer = trainer

        def on_train_begin(self, args, state, control, **kwargs):
            self.trainer.start_sft_selection()

        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.sft_selector.step()

        def on_train_end(self, args, state, control, **kwargs):
            self.trainer.stop_sft_selection()

    SftCallback.__qualname__ = "SftCallback"
    return SftCallback


def __getattr__(name: str) -> type:
    if name == "SftCallback":  # where pickle looks for it
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
