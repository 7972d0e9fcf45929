"""`SftTrainer`: makes sparse fine-tuning work with any subclass of the 🤗 Trainer.

`SftTrainer(Base)` is `Base` plus what sparse fine-tuning adds to training: its own optimiser, a selector that is
stepped after every update step, and a file in every checkpoint so that a run can be resumed at any step. It supports
what the Trainer does with one device or data parallelism; strategies that partition parameters or the optimiser's
state (DeepSpeed, FSDP) are refused, since positions cannot be exchanged in what nobody holds whole.
"""

from __future__ import annotations

import copyreg
import functools
import itertools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...config import write_atomically
from ...utils.save_and_load import read_tensors
from ...utils.warning import warn
from .config import SftConfig
from .optimizer import SftSM3
from .parallel import THREADS, refusal
from .selector import OPTIMIZERS, SftSelector, check_agreement, named_deltas, unselected
from .static import select_static, undisturbed_randomness

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

SELECTOR_NAME = "sft_selector.safetensors"
"""File of the selector's state in a checkpoint folder."""

PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Values of `TrainingArguments.optim` that ask for nothing but AdamW, one of which is the default."""


@functools.cache
def SftTrainer(base: type[Trainer]) -> type[Trainer]:
    """Make a Trainer class for sparse fine-tuning.

    The class is called `Sft<base>`, is made once per base class, can be pickled, and takes two more keyword arguments:
    `sft_config`, by default the configuration of the model's active adapter, and `log_sft_layers`. With "static"
    selection the positions are chosen when training begins, from the first `calibration_batches` of the training data,
    and the optimiser is what the base class makes of the TrainingArguments. Otherwise learning rate, weight decay, and
    for "rigl" the betas and epsilon of AdamW, come from the TrainingArguments; the moments are kept in float32. To set
    anything else, pass an optimiser: `optimizers=(SftSM3(...), None)`.

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


class _OfInstances:
    """A method of trainers that on their class is the base class's static method of that name."""

    def __init__(self, method: Callable) -> None:
        self.method = method

    def __get__(self, trainer: SftTrainerMixin | None, cls: type[SftTrainerMixin]) -> Callable:
        if trainer is None:
            return getattr(cls.sft_base, self.method.__name__)
        return self.method.__get__(trainer, cls)


class SftTrainerMixin:
    """What `SftTrainer(Base)` adds to `Base`."""

    sft_base: type[Trainer]
    """The class that was handed to `SftTrainer`."""

    def __init__(
        self, *args: Any, sft_config: SftConfig | None = None, log_sft_layers: bool = False, **kwargs: Any
    ) -> None:
        from .callback import SftCallback

        super().__init__(*args, **kwargs)
        self.sft_config = _checked_config(sft_config, self.model)
        self.sft_selector: SftSelector | None = None
        self._sft_checkpoint: str | None = None
        self.log_sft_layers = log_sft_layers
        self._sft_logged = 0
        check_agreement(self.model, self.sft_config)
        self._check_optimizer_settings()
        self._check_strategy()
        self.add_callback(SftCallback(self))

    def _check_strategy(self) -> None:
        """Refuse what distributes more than the batch."""
        for is_used, strategy in (
            (self.is_deepspeed_enabled, "DeepSpeed"),
            (self.is_fsdp_enabled or self.is_fsdp_xla_enabled, "FSDP"),
            (getattr(self, "is_distributed_loading_by_transformers", False), "Loading by a DistributedConfig"),
        ):
            if is_used:
                raise ValueError(refusal(strategy))
        if self.args.n_gpu > 1:
            raise ValueError(THREADS.format(self.args.n_gpu))
        if self.sft_config.budget == "global" and self.args.world_size > 1:
            raise ValueError(
                f"budget='global' changes the sizes of parameters after they were handed to data parallelism, which "
                f"needs them fixed, and there are {self.args.world_size} processes; use budget='per_layer', or one "
                f"process"
            )

    # ---- Optimiser ----

    def _check_optimizer_settings(self) -> None:
        """Refuse, before anything is spent on training, what would be ignored or could not work."""
        algorithm = self.sft_config.selection_algorithm
        if algorithm == "static":
            return  # nothing moves, so any optimiser will do, and the base class makes what `optim` asks for
        needed = OPTIMIZERS[algorithm]
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
        from transformers import Trainer

        if self.sft_base.get_optimizer_cls_and_kwargs is not Trainer.get_optimizer_cls_and_kwargs:
            raise ValueError(
                f"{self.sft_base.__name__} overrides get_optimizer_cls_and_kwargs, but selection_algorithm="
                f"{algorithm!r} needs {needed.__name__} and its settings, which SftTrainer gives by that method; "
                f"override it in a subclass of SftTrainer({self.sft_base.__name__}) and change what super() returns, "
                f"or pass optimizer_cls_and_kwargs=({needed.__name__}, {{...}})"
            )
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
        """Make the optimiser as the base class does, with what `get_optimizer_cls_and_kwargs` gives.

        Raises:
            TypeError: The base class overrides this method and makes another optimiser than the selection needs.
        """
        is_made_here = self.optimizer is None  # else brought by the user, or left, wrapped, by an earlier training
        # A user's override often lacks the argument, which the Trainer passes under FSDP only.
        super().create_optimizer() if model is None else super().create_optimizer(model)
        needed = OPTIMIZERS[self.sft_config.selection_algorithm]
        if is_made_here and not isinstance(self.optimizer, needed):
            raise TypeError(
                f"create_optimizer of {self.sft_base.__name__} made {type(self.optimizer).__name__}, but "
                f"selection_algorithm={self.sft_config.selection_algorithm!r} needs {needed.__name__}; make that, or "
                f"take the class from self.get_optimizer_cls_and_kwargs(self.args)"
            )
        return self.optimizer

    @_OfInstances  # transformers' method is static, but the optimiser depends on the trainer's configuration
    def get_optimizer_cls_and_kwargs(
        self, args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """The optimiser that the selection algorithm needs, with its settings from `args`."""
        if self.sft_config.selection_algorithm == "static":
            return super().get_optimizer_cls_and_kwargs(args, model)
        needed = OPTIMIZERS[self.sft_config.selection_algorithm]
        kwargs: dict[str, Any] = {"lr": args.learning_rate, "eps": args.adam_epsilon}
        if needed is SftSM3:
            deltas = named_deltas(self.model if model is None else model)
            kwargs["deltas"] = {delta.values: delta for delta in deltas.values()}
        else:
            kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "momentum_dtype": torch.float32}
        return needed, kwargs

    # ---- Selection ----

    def start_sft_selection(self) -> None:
        """Make the selector of the coming training, in the state of the checkpoint that is being resumed, if any."""
        self.stop_sft_selection()
        self._select_static()
        self.sft_selector = SftSelector(
            self.model_wrapped,  # by which the selector sees the data parallelism
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

    def _select_static(self) -> None:
        """Choose the positions of a "static" adapter, unless it has been done, in the run that is resumed perhaps."""
        config = self.sft_config
        if not unselected(named_deltas(self.model), config):
            return
        batches = self._calibration_batches() if config.static_criterion != "magnitude" else None
        select_static(
            self.model_wrapped,  # by which it sees the data parallelism
            batches,
            self._calibration_loss,
            criterion=config.static_criterion,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )

    def _calibration_batches(self) -> list[Any]:
        """The first batches of this rank, of a data loader of their own and without a trace in the training's."""
        known = list(self.accelerator._dataloaders)
        loader = self.get_train_dataloader()
        self.accelerator._dataloaders[:] = known
        # Not through accelerate's shell, which takes a loader that was not read to its end for the one that is current.
        with undisturbed_randomness():
            return list(
                itertools.islice(getattr(loader, "base_dataloader", loader), self.sft_config.calibration_batches)
            )

    def _calibration_loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        batch = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            return self.compute_loss(model, batch)

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
        from accelerate.utils import gather_object

        path = os.path.join(checkpoint, SELECTOR_NAME)
        found = gather_object([os.path.isfile(path)])
        if any(found) and not all(found):
            missing = [rank for rank, is_there in enumerate(found) if not is_there]
            raise ValueError(
                f"{path} is missing for the processes {missing} of {len(found)}: every machine needs the whole "
                f"checkpoint folder"
            )
        if not all(found):
            warn(
                f"{checkpoint} has no {SELECTOR_NAME}: gradients gathered before it was saved are lost, so training "
                "will not continue exactly as it would have"
            )
            return
        state = read_tensors(path)
        saved_step = int(state.get("completed_steps", -1))
        if saved_step != self.state.global_step:
            raise ValueError(
                f"{path} was saved after {saved_step} update steps, but the checkpoint after {self.state.global_step}"
            )
        self.sft_selector.load_state_dict(state)


def _checked_config(config: SftConfig | None, model: nn.Module) -> SftConfig:
    """`config`; None: that of the model's active adapter, of the SFT one if several are active."""
    from ...peft_model import PeftModel

    if config is None and isinstance(model, PeftModel):
        configs = [model.peft_config[name] for name in model.active_adapters]
        config = next((config for config in configs if isinstance(config, SftConfig)), next(iter(configs), None))
    if config is None:
        raise ValueError(
            "The model has no adapter to take `sft_config` from; make one with get_peft_model(model, SftConfig(...)) "
            "before the trainer"
        )
    if not isinstance(config, SftConfig):
        raise TypeError(f"SftTrainer needs an SftConfig, got {type(config).__name__}")
    return config


# ---- Pickling ----


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
