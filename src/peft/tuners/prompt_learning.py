"""What all prompt methods share: encoders that make prompts, the module that holds them, and their tuner.

A prompt method adds trained vectors in front of what the model reads and leaves its layers alone: a prompt is
`embeddings`, or, for prefix tuning, `key_values` of every layer. A method is a `BasePromptEncoder` and a configuration;
how its prompt gets into the model is in `prompt_insertion.py`.

Letters: B rows, S stacks that get a prompt (2 in encoder-decoders), T virtual tokens of each, D the prompt's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from ..mapping import PEFT_TYPE_TO_TUNER_MAPPING
from ..utils.other import AdapterParts
from ..utils.placement import home_device, onloaded
from ..utils.quantization_utils import keep_packed
from ..utils.warning import warn
from .base import BaseTuner, check_adapter_name, wrap_modules_to_save
from .parts import PROMPTS
from .tuners_utils import BASE_ADAPTER, as_list

_IN_MEMORY = "prompt_encoder."  # what stands before an encoder's own names in the dicts of `utils/save_and_load.py`


class BasePromptEncoder(nn.Module):
    """Makes the prompt of one adapter.

    Adapter files hold the finished prompt: loaded, or made for inference, an encoder is a table of numbers. What a
    prompt is computed from (where `head` is a module) stands in a file beside them, with which training goes on.

    Args:
        config: with the fields that the model fills in (`PromptLearningConfig.for_model`).
        word_embeddings: the base model's, for initialisations that start from them.
    """

    kind = "embeddings"  # or "key_values"
    in_decoder = False  # whether the decoder of an encoder-decoder reads embeddings too, the second T of them
    has_loss = False  # whether it has a `loss` of its own
    fixed: tuple[str, ...] = ()  # parameters that never train
    head_name: str | None = None  # attribute of the module that computes the prompt from `embedding`
    # Parameters beside `embedding.weight` that files hold under their own names.
    kept: tuple[str, ...] = ()

    def __init__(self, config, word_embeddings: nn.Module | None = None):
        super().__init__()
        self.total_virtual_tokens = self.rows(config)
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.width(config))

    @staticmethod
    def rows(config) -> int:
        """S T: every stack has virtual tokens of its own."""
        return config.num_virtual_tokens * config.num_transformer_submodules

    @staticmethod
    def width(config) -> int:
        """D."""
        return config.token_dim

    @torch.no_grad()
    def start_from(self, word_embeddings: nn.Module, ids: torch.Tensor) -> None:
        """Begin with the embeddings of these tokens, (S T,)."""
        with onloaded(word_embeddings):
            self.embedding.weight.copy_(word_embeddings(ids.to(word_embeddings.weight.device)))

    @property
    def head(self) -> nn.Module | None:
        return None if self.head_name is None else getattr(self, self.head_name, None)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The prompt's vectors with these numbers, (..., D)."""
        return self.embedding(indices)

    def get_prompt(self, batch: int, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The prompt of `batch` rows, (B, S T, D). It is computed once."""
        if task_ids is not None:
            raise ValueError(f"task_ids are for multitask prompt tuning, {type(self).__name__} has one prompt for all")
        indices = torch.arange(self.total_virtual_tokens, device=self.embedding.weight.device)
        return self(indices).unsqueeze(0).expand(batch, -1, -1)

    def mask(self) -> torch.Tensor:
        """Which virtual tokens are attended to, (T S), 1 or 0."""
        return torch.ones(self.total_virtual_tokens, dtype=torch.long, device=self.embedding.weight.device)

    def loss(self, logits, labels, input_type_mask):
        """For methods with a loss of their own: it takes the place of the model's."""
        raise NotImplementedError

    # Files

    def to_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """From the encoder's own tensors to those of an adapter file; others pass."""
        own = {key.removeprefix(_IN_MEMORY): t for key, t in tensors.items() if key.startswith(_IN_MEMORY)}
        others = {key: tensor for key, tensor in tensors.items() if not key.startswith(_IN_MEMORY)}
        return {**{name: own[name] for name in self.kept}, "prompt_embeddings": self.finished(own), **others}

    def network(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of these tensors those that the prompt is computed from; none where it is a table."""
        if self.head is None:
            return {}
        return {key: tensor for key, tensor in tensors.items() if key.startswith(_IN_MEMORY)}

    @torch.no_grad()
    def finished(self, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The prompt as files have it, (S T, D), from these tensors in place of the encoder's own."""
        if self.head is None:
            return own["embedding.weight"]
        training, device = self.training, own["embedding.weight"].device
        self.eval()  # without dropout
        try:
            indices = torch.arange(self.total_virtual_tokens, device=device)
            return torch.func.functional_call(self, dict(own), (indices,))
        finally:
            self.train(training)

    def from_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The way back. Without its `network`, or with that of another prompt, an encoder loses its head."""
        network = self.network(tensors)
        tensors = {key: tensor for key, tensor in tensors.items() if key not in network}
        if self.head is not None and "prompt_embeddings" in tensors:
            if self._makes(network, tensors["prompt_embeddings"]):
                del tensors["prompt_embeddings"]
                return {**tensors, **network}
            warn(
                f"The file holds the finished prompt, not the {self.head_name} of {type(self).__name__} that made it: "
                "from now on the prompt itself is trained (an optimizer that was made before has to be made anew)"
            )
            self._drop_head()
        names = {"prompt_embeddings": "embedding.weight", **{name: name for name in self.kept}}
        return {_IN_MEMORY + names[key] if key in names else key: tensor for key, tensor in tensors.items()}

    def _makes(self, network: Mapping[str, torch.Tensor], prompt: torch.Tensor) -> bool:
        """Whether the prompt, which may have been trained on without it, is what this `network` computes."""
        own = {key.removeprefix(_IN_MEMORY): tensor for key, tensor in network.items()}
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in self.state_dict().items()}:
            return False
        made = self.finished(own)
        return made.shape == prompt.shape and torch.allclose(made, prompt.to(made), rtol=1e-3, atol=1e-4)

    def _drop_head(self) -> None:
        old, shape = self.embedding.weight, self.finished(self.state_dict()).shape
        delattr(self, self.head_name)
        self.embedding = nn.Embedding(*shape, device=old.device, dtype=old.dtype)
        self.embedding.weight.requires_grad_(old.requires_grad)


class PromptEncoders(AdapterParts, nn.ModuleDict):
    """`{adapter: its encoder}`, what of them is active, and what trains: `PeftModel.prompt_encoder`."""

    def __init__(self, word_embeddings: nn.Module):
        nn.ModuleDict.__init__(self)
        vars(self)["word_embeddings"] = word_embeddings  # the base model's: not a part of this module
        self._init_flags()
        self._active_adapter: list[str] = []
        self.disable_adapters = False

    @property
    def _available_adapters(self) -> set[str]:
        return set(self)

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        if name in self:
            encoder = self[name]
            yield from ((path, tensor) for path, tensor in encoder.named_parameters() if path not in encoder.fixed)

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    def enable_adapters(self, enabled: bool) -> None:
        self.disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = as_list(adapter_names)
        for name in self:
            self._set_flags(name, name in names and not inference_mode)
        self._active_adapter = names

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self:
            del self[adapter_name]
        self._forget_flags(adapter_name)
        self._active_adapter = [name for name in self._active_adapter if name != adapter_name]

    def of(self, names: Sequence[str]) -> dict[str, BasePromptEncoder]:
        """The encoders of these adapters; `__base__` has none."""
        return {name: self[name] for name in dict.fromkeys(names) if name != BASE_ADAPTER}


class PromptTuner(BaseTuner):
    """A base model with prompts. Its layers stay as they are; modules in `modules_to_save` are wrapped.

    It is not a part of the `PeftModel` that uses it: that one holds the base model itself, and the encoders.
    """

    def __init__(self, model: nn.Module, peft_config, adapter_name: str, low_cpu_mem_usage: bool = False):
        if not callable(getattr(model, "get_input_embeddings", None)):
            raise ValueError(
                f"Prompt methods need a transformers model (with get_input_embeddings), got {type(model).__name__}"
            )
        encoders = vars(model).setdefault(PROMPTS, PromptEncoders(model.get_input_embeddings()))
        vars(self)["prompt_encoder"] = encoders  # before nn.Module's __init__, which starts the injection
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            if not encoders:
                del vars(model)[PROMPTS]  # it has failed: no trace is left

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ) -> None:
        """Make the encoder of adapter `adapter_name`. It is float32, whatever the base model is."""
        check_adapter_name(adapter_name)
        config, encoders = self.peft_config[adapter_name], self.prompt_encoder
        self._check_beside_others(config)
        keep_packed(model.named_modules(), is_trainable=not config.inference_mode)
        active, disabled = self.active_adapters, encoders.disable_adapters
        device = home_device(encoders.word_embeddings)
        with torch.device("meta") if low_cpu_mem_usage or device.type == "meta" else nullcontext():
            encoder = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](config, encoders.word_embeddings)
        encoders[adapter_name] = encoder.train(model.training)
        if device.type != "meta" and not low_cpu_mem_usage:
            encoder.to(device)
        try:
            wrap_modules_to_save(model, config.modules_to_save or [], adapter_name)
        except Exception:
            self.take_back(adapter_name)
            raise
        for path in encoder.fixed:
            encoder.get_parameter(path).requires_grad_(False)
        self._mark_only_adapters_as_trainable(model)
        for wrapper in self.wrappers():
            wrapper._active_adapter = list(active)
            wrapper.enable_adapters(not disabled)
            wrapper._set_flags(adapter_name, False)
        encoders._set_flags(adapter_name, False)

    def get_prompt(self, adapter_name: str, batch: int, task_ids: torch.Tensor | None = None):
        """See `PeftModel.get_prompt`."""
        encoder = self.prompt_encoder[adapter_name]
        prompt = encoder.get_prompt(batch, task_ids)
        if encoder.kind == "embeddings":
            return prompt
        from .prompt_insertion import fill_cache, new_cache

        cache = new_cache(self.model.config)
        fill_cache(cache, prompt.to(self.model.dtype), self.peft_config[adapter_name])
        return cache

    def _check_beside_others(self, config) -> None:
        others = [c for name, c in self.peft_config.items() if name in self.prompt_encoder]
        for other in others:
            if other.num_transformer_submodules != config.num_transformer_submodules:
                raise ValueError(
                    f"The prompts of a model must go into the same stacks: it has num_transformer_submodules="
                    f"{other.num_transformer_submodules}, got {config.num_transformer_submodules}"
                )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if len(as_list(adapter_name)) > 1:
            raise ValueError(f"One prompt can be active at a time, got {as_list(adapter_name)}")
        super().set_adapter(adapter_name, inference_mode)

    def unload(self) -> nn.Module:
        """Give the base model back without its prompts."""
        model = super().unload()
        self.prompt_encoder.clear()
        vars(model).pop(PROMPTS, None)
        return model

    def _merge_for_good(self, names, safe_merge, dequantize) -> None:
        self.merge_adapter(names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refused.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "A prompt changes what the model reads, not its weights, so it cannot be merged into them: use the adapter "
            "as it is, or unload() for the base model"
        )

    def unmerge_adapter(self) -> None:
        """Nothing is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
