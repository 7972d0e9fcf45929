"""`PeftModel`: a base model with named adapters, as users hold it, and its subclasses per task.

It knows adapters as wholes: adding, loading, saving, switching, mixing in one batch, disabling. What they do to layers
is in the tuners. The task classes differ only in which head they train along.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ._lazy import explain_missing
from .config import PeftConfig, find_file, split_hub_kwargs
from .mapping import PEFT_TYPE_TO_TUNER_MAPPING, config_class
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from .tuners.attention import check_mixed
from .tuners.base import BASE_ADAPTER, BaseTuner, check_adapter_name
from .tuners.parts import modules_with_adapters
from .tuners.prompt_learning import PromptTuner
from .tuners.tuners_utils import BaseTunerLayer
from .utils.constants import CONFIG_NAME
from .utils.other import AuxiliaryTrainingWrapper, walk
from .utils.peft_types import PeftType, TaskType
from .utils.placement import reshard
from .utils.save_and_load import (
    adapter_content,
    load_peft_weights,
    load_prompt_network,
    report_incompatible,
    set_peft_model_state_dict,
    write_adapter,
)
from .utils.warning import warn

__all__ = [
    "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
    "TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status",
]  # fmt: skip


class PeftModel(nn.Module):
    """A base model with adapters.

    Args:
        model: the base model; its target layers are replaced in place.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: widen adapter parameters of half precision to float32.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.
    """

    # Modules that this task trains whole along with every adapter.
    task_heads: tuple[str, ...] = ()
    # Whether all adapters are of the first one's method.
    one_method = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        config_class(peft_config.peft_type)  # a method that is not here is named
        check_adapter_name(adapter_name)
        self._add_task_heads(peft_config)
        has_prompts = peft_config.is_prompt_learning
        make = self._tuner_class(peft_config)
        tuner = make(model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        self.base_model: nn.Module = model if has_prompts else tuner
        if has_prompts:
            vars(self)["_prompt_tuner"] = tuner  # not a part of this module: the base model is, and the encoders are
            self.prompt_encoder = tuner.prompt_encoder
        tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.prepare_model_for_gradient_checkpointing(model)
        self.special_peft_forward_args = {"adapter_names"}
        if getattr(getattr(self.base_model, "config", None), "pretraining_tp", 1) > 1:
            self.base_model.config.pretraining_tp = 1  # slices base weights in forward, past the adapters

    @staticmethod
    def _tuner_class(peft_config: PeftConfig) -> type[BaseTuner]:
        return PromptTuner if peft_config.is_prompt_learning else PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]

    def _add_task_heads(self, peft_config: PeftConfig) -> None:
        if not self.task_heads or not hasattr(peft_config, "modules_to_save"):
            return
        listed = list(peft_config.modules_to_save or [])
        peft_config.modules_to_save = listed + [name for name in self.task_heads if name not in listed]

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Reentrant checkpoints pass gradients only if their inputs require them: let the embeddings' output do so."""
        if _checkpoints(model) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        return model

    # What there is

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self._tuner.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self._tuner.active_adapters

    @property
    def active_adapter(self) -> str:
        """The (first) active adapter."""
        active = self._tuner.active_adapters
        return active[0] if active else ""

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the (first) active adapter.

        Raises:
            ValueError: there is none.
        """
        if self.active_adapter not in self.peft_config:
            raise ValueError(
                f"No adapter is active; the model has {sorted(self.peft_config)}: activate one with set_adapter(name)"
                if self.peft_config
                else "The model has no adapter: make one with add_adapter(name, config) or load_adapter(folder, name)"
            )
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> PeftType:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {n for config in self.peft_config.values() for n in getattr(config, "modules_to_save", None) or ()}
        return names or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self.active_adapters) and not self._tuner._adapters_disabled

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The base model (with the adapters in it)."""
        return self.base_model if self._has_prompts else self.base_model.model

    @property
    def _has_prompts(self) -> bool:
        return "_prompt_tuner" in vars(self)

    @property
    def _tuner(self) -> BaseTuner:
        return vars(self)["_prompt_tuner"] if self._has_prompts else self.base_model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet, or unpickling
                raise
        # The adapters' methods first: transformers has some of the same names.
        return getattr(self._tuner, name)

    # Adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter of the same method; it is not activated and does not train until it is.

        Raises:
            ValueError: the name is taken or cannot be one, the method is another, or as in `BaseTuner.inject_adapter`.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already: delete it first, or take another name")
        peft_config = peft_config.for_model(self.get_base_model())
        own = next(iter(self.peft_config.values())).peft_type if self.peft_config else peft_config.peft_type
        if self.one_method and peft_config.peft_type != own:
            raise ValueError(
                f"All adapters of a model must be of one method: this one has {own}, got {peft_config.peft_type}. For "
                "several methods make it with get_peft_model(..., mixed=True)"
            )
        self._add_task_heads(peft_config)
        self.peft_config[adapter_name] = peft_config
        try:
            self._tuner.inject_adapter(
                self.get_base_model(), adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
            )
        except Exception:
            del self.peft_config[adapter_name]
            raise

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several in this order, active; they train (unless `inference_mode`), others do not.

        An adapter that its user froze (`set_requires_grad(name, False)`, or through its parameters) stays frozen.

        Raises:
            ValueError: an adapter that does not exist.
        """
        self._tuner.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train or not, active or not; a freeze holds until it is taken back."""
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the first that is left becomes active."""
        self._tuner.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self):
        """Within this context the model is the base model."""
        disabled = self._tuner._adapters_disabled
        merged = [(layer, list(layer.merged_adapters)) for layer in self._tuner.layers() if layer.merged]
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            if not disabled:
                self._tuner.enable_adapter_layers()
            reshard(self)
            for layer, names in reversed(merged):  # a forward in between has unmerged it
                if not layer.merged:
                    layer.merge(adapter_names=names)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`(trained, all)` numbers of parameters; see `status.count_parameters`."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self._tuner.supports_lora_conversion(adapter_name)

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward. `adapter_names=[...]` names the adapter of every row (`__base__`: none)."""
        names = kwargs.pop("adapter_names", None)
        with self._mixed_batch(names), self._prompts(names, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate. `adapter_names=[...]` names the adapter of every row (`__base__`: none)."""
        names = kwargs.pop("adapter_names", None)
        with self._mixed_batch(names, generating=True), self._prompts(names, kwargs, generating=True):
            return self.get_base_model().generate(*args, **kwargs)

    def _prompts(self, names: Sequence[str] | None, kwargs: dict, generating: bool = False):
        """Within this context calls of the base model have the adapters' prompts, if they are of such a method."""
        if not self._has_prompts:
            return contextlib.nullcontext()
        from .tuners.prompt_insertion import inserted

        return inserted(self.get_base_model(), self.prompt_encoder, self.peft_config, names, kwargs, generating)

    def get_prompt(self, batch_size: int, task_ids: torch.Tensor | None = None) -> Any:
        """The active adapter's prompt for `batch_size` rows: embeddings (rows, tokens, width), or a cache (prefix).

        Raises:
            TypeError: the adapters are not of a prompt method.
        """
        self._refuse_without_prompts()
        return self._tuner.get_prompt(self.active_adapter, batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """An adapter's prompt as files have it, (tokens, width).

        Raises:
            TypeError: the adapters are not of a prompt method.
        """
        self._refuse_without_prompts()
        encoder = self.prompt_encoder[adapter_name]
        return encoder.finished(encoder.state_dict())

    def _refuse_without_prompts(self) -> None:
        if not self._has_prompts:
            raise TypeError(f"{self.peft_type} has no prompt: its adapters are in the layers")

    @contextlib.contextmanager
    def _mixed_batch(self, adapter_names: Sequence[str] | None, generating: bool = False):
        """Hand `adapter_names` to every adapter layer for the duration of one call.

        In generation a layer may see several hypotheses per row, beside each other; names are repeated to match.
        """
        if adapter_names is None:
            yield
            return
        names = list(adapter_names)
        unknown = sorted(set(names) - set(self.peft_config) - {BASE_ADAPTER})
        if unknown:
            raise ValueError(
                f"adapter_names holds unknown adapters {unknown}; the model has {sorted(self.peft_config)}, and "
                f"{BASE_ADAPTER!r} stands for the base model"
            )
        if self.training and torch.is_grad_enabled() and _checkpoints(self):
            raise ValueError(
                "A mixed batch cannot be trained with gradient checkpointing: the layers run again in the backward "
                "pass, when the batch's adapter_names are gone. Switch one of them off"
            )

        check_mixed(self)

        def hand_over(module, args, kwargs, *, exact):
            x = args[0] if args else next(iter(kwargs.values()))
            repeat = 1 if exact or not names or x.shape[0] % len(names) else x.shape[0] // len(names)
            return args, kwargs | {"adapter_names": [name for name in names for _ in range(max(1, repeat))]}

        with contextlib.ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                    hook = partial(hand_over, exact=not generating)
                    stack.enter_context(_removing(module.register_forward_pre_hook(hook, with_kwargs=True)))
            yield

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters: `adapter_config.json`, `adapter_model.safetensors` and a model card.

        The adapter called "default" goes into the folder itself, others into folders of their name inside it. Every
        file is written beside and then renamed.

        Args:
            safe_serialization: False writes `adapter_model.bin`.
            selected_adapters: which ones; None: all.
            save_embedding_layers: see `get_peft_model_state_dict`.
            is_main_process: other processes of a distributed run write nothing.
            path_initial_model_for_weight_conversion: where the same adapter was saved before its training, for
                initialisations that change the base weights (PiSSA, OLoRA, ...): what is written is a plain LoRA of
                twice the rank for the original weights.
            state_dict: the model's state dict where it had to be gathered.
            kwargs: `push_to_hub=True` (with `repo_id`, `token`, ...) uploads the folder afterwards.
                `save_function` has no effect, since every file is written beside and renamed. Others are named in a
                warning.

        Raises:
            ValueError: a file in place of the folder, an unknown adapter, or none at all; with
                `path_initial_model_for_weight_conversion`, another initialisation, or another adapter's folder.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory must be a folder, but {save_directory!r} is a file")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"selected_adapters holds unknown adapters {unknown}; there are {sorted(self.peft_config)}"
            )
        if not names:
            raise ValueError("There is no adapter to save")
        push = kwargs.pop("push_to_hub", False)
        push_kwargs = {k: kwargs.pop(k) for k in ("repo_id", "token", "private", "commit_message") if k in kwargs}
        kwargs.pop("save_function", None)
        if kwargs:
            warn(f"save_pretrained has no use for {sorted(kwargs)}")
        content = {name: adapter_content(self, state_dict, name, save_embedding_layers) for name in names}
        tensors = {name: own for name, (own, _) in content.items()}
        configs = {name: self._config_to_save(name) for name in names}
        if path_initial_model_for_weight_conversion is not None:
            from .tuners.lora.init import without_initial

            initial = load_peft_weights(path_initial_model_for_weight_conversion, device="cpu")
            for name in names:
                configs[name], tensors[name] = without_initial(configs[name], tensors[name], initial)
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        self.create_or_update_model_card(save_directory)
        for name in names:
            folder = os.path.join(save_directory, name) if name != "default" else save_directory
            os.makedirs(folder, exist_ok=True)
            write_adapter(tensors[name], folder, safe_serialization, content[name][1])
            configs[name].save_pretrained(folder)
        if push:
            from .utils.hub import upload_folder

            push_kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            upload_folder(save_directory, **push_kwargs)

    def _config_to_save(self, name: str) -> PeftConfig:
        config = copy.copy(self.peft_config[name])
        config.inference_mode = True
        base = self.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base, "name_or_path", None)
        if config.task_type is None:
            config.auto_mapping = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
        return config

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Upload the adapters to the hub; see `peft.utils.hub.push_to_hub`."""
        from .utils.hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write `README.md` with what is known of the adapter, or bring the metadata of an existing one up to date."""
        from .utils.model_card import write_model_card

        write_model_card(self, output_dir)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on a base model.

        Args:
            model: the base model; changed in place.
            model_id: folder or hub id of the adapter.
            is_trainable: whether it is to be trained on; else it is frozen.
            config: use this configuration instead of the saved one.
            low_cpu_mem_usage: create the adapter empty and take the file's tensors over.
            key_mapping: `{regular expression: replacement}` for the file's keys.
            kwargs: as in `load_adapter`.

        Raises:
            ValueError: no configuration or no weights there, or a method that is not here.
        """
        hub, _ = split_hub_kwargs(kwargs)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
        config.inference_mode = not is_trainable
        _set_runtime(config, ephemeral_gpu_offload)
        from .mapping_func import task_class

        kind = task_class(config) if cls is PeftModel else cls
        peft_model = kind(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        try:
            peft_model.load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                key_mapping=key_mapping,
                **kwargs,
            )
        except Exception:
            peft_model.unload()  # the base model as it was, not with half an adapter
            raise
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        """Load a saved adapter beside the others, or its tensors into one that exists. It is not activated.

        Args:
            torch_device: where to read the tensors to; None: an accelerator if there is one.
            ephemeral_gpu_offload: as in `LoraRuntimeConfig`; for a new LoRA, and without effect otherwise.
            kwargs: arguments of `hf_hub_download` (`subfolder`, `revision`, `token`, ...), and
                `ignore_mismatched_sizes`. Others are named in a warning.

        Returns:
            `(missing_keys, unexpected_keys)`; both are reported in warnings too.

        Raises:
            ValueError: no configuration or no weights there, a bad name, another method than the model's, tensors that
                cannot be the adapter's, or, with low_cpu_mem_usage, tensors that are not there.
            RuntimeError: tensors of another shape.
        """
        hub, rest = split_hub_kwargs(kwargs)
        ignore_mismatched_sizes = rest.pop("ignore_mismatched_sizes", False)
        if rest:
            warn(
                f"Loading an adapter has no use for {sorted(rest)}: its tensors go where their base layers are, and "
                "autocast_adapter_dtype decides about their type",
            )
        tensors = load_peft_weights(model_id, device=torch_device, key_mapping=key_mapping, **hub)
        is_new = adapter_name not in self.peft_config
        if is_new:
            config = PeftConfig.from_pretrained(model_id, **hub)
            config.inference_mode = not is_trainable
            _set_runtime(config, ephemeral_gpu_offload)
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        elif (path := find_file(model_id, CONFIG_NAME, **hub)) is not None:
            self._tuner.before_loading(adapter_name, PeftConfig.from_json_file(path))
        try:
            tensors |= load_prompt_network(self, adapter_name, model_id, torch_device, **hub)
            result = set_peft_model_state_dict(
                self,
                tensors,
                adapter_name,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            self._refuse_empty(adapter_name, result.missing_keys)
        except Exception:
            if is_new:
                self._tuner.take_back(adapter_name)
                del self.peft_config[adapter_name]
            raise
        report_incompatible(result, adapter_name, model_id)
        self._tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return result

    def _refuse_empty(self, adapter_name: str, missing: Sequence[str]) -> None:
        """Refuse an adapter that was created on the meta device and that its file did not fill."""
        for part in modules_with_adapters(self.get_base_model()):
            if any(tensor.is_meta for _, tensor in part.adapter_tensors(adapter_name)):
                raise ValueError(
                    f"With low_cpu_mem_usage the file must hold every tensor of adapter {adapter_name!r}, but it lacks "
                    f"{len(missing)}, such as {list(missing[:3])}: load it without, and they keep their initial values"
                )


def _checkpoints(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on in any part of a transformers model."""
    return any(getattr(module, "gradient_checkpointing", False) is True for _, module in walk(model))


@contextlib.contextmanager
def _removing(handle):
    try:
        yield handle
    finally:
        handle.remove()


def _set_runtime(config: PeftConfig, ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload and hasattr(config, "runtime_config"):
        config.runtime_config = replace(config.runtime_config, ephemeral_gpu_offload=True)


class PeftModelForSequenceClassification(PeftModel):
    """Adapters with a classification head (`classifier` or `score`) trained along."""

    task_heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """Adapters with a token-classification head (`classifier` or `score`) trained along."""

    task_heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """Adapters with an extractive question-answering head (`qa_outputs`) trained along."""

    task_heads = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    """Adapters on a causal language model."""

    @property
    def prepare_inputs_for_generation(self):
        return self.get_base_model().prepare_inputs_for_generation


class PeftModelForSeq2SeqLM(PeftModelForCausalLM):
    """Adapters on an encoder-decoder language model."""


class PeftModelForFeatureExtraction(PeftModel):
    """Adapters on a model whose hidden states are what counts."""


TASK_CLASSES: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}

explain_missing(__name__, {"TrainableTokensWrapper": "peft.tuners.trainable_tokens.wrapper"})
