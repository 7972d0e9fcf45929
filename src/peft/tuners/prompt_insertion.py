"""Where prompts go into a model: the one place for all prompt methods, all tasks, `forward` and `generate`.

For the duration of one call hooks stand on the base model, on its encoder (of an encoder-decoder), and on its word
embeddings. A prompt of embeddings lengthens the token ids by placeholders, whose embeddings it then replaces: so models
see token ids as ever (for the last token that is no padding, for image tokens, for their own scale of the embeddings),
and masks, positions, token types and labels are lengthened along. Key-values of a prefix are written into the cache, a
new one or the one that `generate` has made. With tokens in the cache the prompt is there already, and only the mask and
the positions are to know of it.

Rows of a mixed batch have prompts of different lengths, or none: the missing tokens stand in front and are masked.

Letters: B rows, N virtual tokens in front, L tokens, D width of the embeddings.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.peft_types import TaskType
from .tuners_utils import BASE_ADAPTER

_INPUTS = {key: key for key in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")}
_DECODER_INPUTS = {key: f"decoder_{key}" for key in _INPUTS}


@contextlib.contextmanager
def inserted(
    model: nn.Module, encoders, configs: dict, adapter_names: Sequence[str] | None, kwargs: dict, generating: bool
) -> Iterator[None]:
    """Within this context calls of the base model have the prompts of the active adapter, or those of each row.

    Args:
        model: the base model.
        encoders: the `PromptEncoders` of its adapters, and `configs` their configurations.
        adapter_names: of each row of the batch; None: the active one for all.
        kwargs: of the call; what is meant for the prompts (`task_ids`, `input_type_mask`) is taken out.
        generating: whether the model's `generate` is called.
    """
    own = {key: kwargs.pop(key) for key in ("task_ids", "input_type_mask") if key in kwargs}
    names = list(encoders.active_adapters if adapter_names is None else adapter_names)
    if adapter_names is not None and not names:
        raise ValueError("adapter_names must name one adapter per row, got 0 names")
    if encoders.disable_adapters or not encoders.of(names):
        yield
        return
    if generating:
        _check_generation(kwargs)
    repeats = generating or adapter_names is None  # rows that share a name need not be named one by one
    insertion = Insertion(model, encoders.of(names), configs, names, repeats, generating, **own)
    with contextlib.ExitStack() as stack:
        for handle in insertion.handles():
            stack.callback(handle.remove)
        yield


def _check_generation(kwargs: dict[str, Any]) -> None:
    """Refuse what counts tokens of the cache against those of the text: there are more, the virtual ones."""
    config = kwargs.get("generation_config")
    given = {**({} if config is None else vars(config)), **kwargs}
    cache = given.get("past_key_values")
    found = [key for key in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit") if given.get(key)]
    if cache is not None and cache.get_seq_length():
        found.append("past_key_values")
    if getattr(cache, "is_compileable", False) or given.get("cache_implementation") in ("static", "offloaded_static"):
        found.append("a static cache")
    if found:
        raise ValueError(
            f"generate() with a prompt adapter cannot take {', '.join(found)}: the cache holds virtual tokens which "
            "these do not count. Leave it out"
        )


class Insertion:
    """What is inserted during one call of a model, and the hooks that do it."""

    def __init__(self, model, encoders, configs, names, repeats, generating, task_ids=None, input_type_mask=None):
        self.model, self.encoders, self.names = model, encoders, names
        self.repeats, self.generating = repeats, generating
        self.task_ids, self.input_type_mask = task_ids, input_type_mask
        first = next(iter(encoders))
        self.config, self.kind = configs[first], encoders[first].kind
        self.stacks = self.config.num_transformer_submodules if self.kind == "embeddings" else 1
        self.lengths = {name: encoder.total_virtual_tokens // self.stacks for name, encoder in encoders.items()}
        self.N = max(self.lengths.values())
        self.is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.accepted = inspect.signature(model.forward).parameters
        self.waiting: dict[nn.Module, list[torch.Tensor]] = {}  # word embeddings -> what their next calls get
        self.cache, self.drops_cache, self.labels = None, False, None
        self.in_decoder = encoders[first].in_decoder and self.stacks == 2
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.own_loss = encoders[first] if encoders[first].has_loss else None
        if input_type_mask is not None and self.own_loss is None:
            raise ValueError(f"input_type_mask is for CPT; {self.config.peft_type} has no use for it")

    def handles(self) -> Iterator:
        """Put the hooks on, for this thread: replicas of `nn.DataParallel` have them in common."""
        thread = threading.get_ident()

        def own(hook):
            return lambda *args: hook(*args) if threading.get_ident() == thread else None

        yield self.model.register_forward_pre_hook(own(self._before_model), with_kwargs=True)
        yield self.model.register_forward_hook(own(self._after_model))
        if self.kind == "embeddings":
            if self.is_seq2seq:
                yield self.model.get_encoder().register_forward_pre_hook(own(self._before_encoder), with_kwargs=True)
            stacks = [self.model.get_encoder(), self.model.get_decoder()] if self.is_seq2seq else [self.model]
            for module in {stack.get_input_embeddings(): None for stack in stacks}:
                yield module.register_forward_hook(own(self._after_embedding))

    # The prompts of the rows

    def _rows(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts of a batch, (B, stacks, N, D), and their mask, (B, stacks, N); made once for a call.

        Generation may have several rows for one of the user's, beside each other.
        """
        if batch not in self._made:
            self._made[batch] = self._make_rows(batch)
        return self._made[batch]

    def _make_rows(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        if batch % len(self.names) or (batch != len(self.names) and not self.repeats):
            raise ValueError(f"adapter_names must name one adapter per row: got {len(self.names)} for {batch} rows")
        groups: dict[str, list[int]] = {}
        for row in range(batch):
            groups.setdefault(self.names[row * len(self.names) // batch], []).append(row)
        prompts, masks, order = [], [], []
        for name in sorted(groups, key=lambda name: name == BASE_ADAPTER):  # rows without a prompt have zeros
            rows = groups[name]
            order += rows
            if name == BASE_ADAPTER:
                like = prompts[0]
                prompts.append(like.new_zeros(len(rows), *like.shape[1:]))
                masks.append(masks[0].new_zeros(len(rows), *like.shape[1:3]))
                continue
            encoder, missing = self.encoders[name], self.N - self.lengths[name]
            prompt = encoder.get_prompt(len(rows), self._tasks(rows, batch))
            prompt = prompt.reshape(len(rows), self.stacks, self.lengths[name], -1)
            prompts.append(F.pad(prompt, (0, 0, missing, 0)))
            mask = encoder.mask().view(1, self.stacks, -1).expand(len(rows), -1, -1)
            masks.append(F.pad(mask, (missing, 0)))
        if len(groups) == 1:
            return prompts[0], masks[0]
        back = torch.tensor(order, device=prompts[0].device).argsort()
        return torch.cat(prompts)[back], torch.cat(masks)[back]

    def _tasks(self, rows: list[int], batch: int) -> torch.Tensor | None:
        if self.task_ids is None:
            return None
        if batch % len(self.task_ids) or (batch != len(self.task_ids) and not self.generating):
            raise ValueError(f"task_ids must name one task per row: got {len(self.task_ids)} for {batch} rows")
        return torch.as_tensor(self.task_ids)[[row * len(self.task_ids) // batch for row in rows]]

    # The hooks

    def _before_model(self, module, args, kwargs):
        kwargs = {**dict(zip(self.accepted, args)), **kwargs}
        if not self.is_seq2seq:
            self._insert(kwargs, _INPUTS, 0)
            return (), kwargs
        if self.kind == "embeddings":
            mask = kwargs.get("attention_mask")  # of the encoder's tokens, for the decoder (see `_before_encoder`)
            if mask is not None or self._is_mixed:
                kwargs["attention_mask"] = self._source_mask(mask, kwargs)
        if self.kind == "key_values" or self.in_decoder:
            self._shift_labels(kwargs)
            self._insert(kwargs, _DECODER_INPUTS, self.stacks - 1)
        return (), kwargs

    def _source_mask(self, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
        if mask is None:
            states = kwargs.get("encoder_outputs")
            batch, length, device = _shape_of(kwargs, _INPUTS) if states is None else _shape(states[0])
            length -= 0 if states is None else self.N
            mask = torch.ones(batch, length, dtype=torch.long, device=device)
        return torch.cat([self._rows(mask.shape[0])[1][:, 0].to(mask), mask], dim=1)

    @property
    def _is_mixed(self) -> bool:
        return BASE_ADAPTER in self.names or len(set(self.lengths.values())) > 1

    def _shift_labels(self, kwargs: dict[str, Any]) -> None:
        """What the model would do itself, from labels that are not lengthened yet."""
        given = any(kwargs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
        if not given and kwargs.get("labels") is not None:
            kwargs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=kwargs["labels"])

    def _before_encoder(self, module, args, kwargs):
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs}
        batch, length, _ = _shape_of(kwargs, _INPUTS)
        mask = kwargs.get("attention_mask")
        # The model's mask has the virtual tokens already; `generate` calls the encoder alone.
        is_longer = mask is not None and mask.shape[1] == self.N + length
        prompt, own = (each[:, 0] for each in self._rows(batch))
        if not is_longer and (mask is not None or self._is_mixed):
            kwargs["attention_mask"] = self._source_mask(mask, kwargs)
        self._prepend(kwargs, _INPUTS, prompt, module.get_input_embeddings())
        return (), kwargs

    def _insert(self, kwargs: dict[str, Any], keys: dict[str, str], stack: int) -> None:
        """Insert into the arguments of the model, of which `keys` gives the names."""
        batch, length, device = _shape_of(kwargs, keys)
        prompt, own = (each[:, stack].to(device) for each in self._rows(batch))
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else cache.get_seq_length()
        _refuse_packed(
            kwargs.get(keys["attention_mask"]), kwargs.get(keys["position_ids"]), kwargs.get("cu_seq_lens_q")
        )
        self._lengthen_masks(kwargs, keys, own, seen, length)
        if seen:
            return
        if self.kind == "key_values":
            self._fill_cache(kwargs, prompt)
            return
        types = keys["token_type_ids"]
        if kwargs.get(types) is not None:
            kwargs[types] = F.pad(kwargs[types], (self.N, 0))
        self._lengthen_labels(kwargs, batch, length)
        source = self.model.get_decoder() if self.is_seq2seq else self.model
        self._prepend(kwargs, keys, prompt, source.get_input_embeddings())

    def _lengthen_masks(self, kwargs, keys, own: torch.Tensor, seen: int, length: int) -> None:
        mask_key, position_key = keys["attention_mask"], keys["position_ids"]
        mask, before = kwargs.get(mask_key), max(0, seen - self.N)
        if mask is None and not own.all():
            mask = own.new_ones(own.shape[0], before + length)
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(
                    f"{mask_key} must be (rows, tokens) with a prompt adapter, got {tuple(mask.shape)}: masks of more "
                    "dimensions cannot be lengthened by virtual tokens"
                )
            if mask.shape[1] == before + length:
                mask = torch.cat([own.to(mask), mask], dim=1)
            kwargs[mask_key] = mask
        positions = kwargs.get(position_key)
        if positions is not None:
            positions = positions + own.sum(1, keepdim=True)
            if not seen and self.kind == "embeddings":
                front = (own.cumsum(1) - 1).clamp(min=0).expand(*positions.shape[:-1], -1)
                positions = torch.cat([front.to(positions), positions], dim=-1)
            kwargs[position_key] = positions
        elif (
            position_key in self.accepted and mask is not None and _padded_left(mask) and not _counts_by_ids(self.model)
        ):
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            kwargs[position_key] = positions if not seen and self.kind == "embeddings" else positions[:, -length:]

    def _lengthen_labels(self, kwargs: dict[str, Any], batch: int, length: int) -> None:
        """Labels of tokens get -100 for the virtual ones."""
        labels = kwargs.get("labels")
        if self.own_loss is not None:
            if kwargs.get("fused_lm_head"):
                raise ValueError(
                    "CPT has a loss of its own, made of logits, which TRL's SFTTrainer does not compute: use "
                    "transformers' Trainer"
                )
            self.labels = kwargs.pop("labels", None)
            if self.labels is not None and (len(set(self.names)) > 1 or BASE_ADAPTER in self.names):
                raise ValueError("The loss of CPT is that of one adapter: a mixed batch cannot have labels")
        elif labels is not None and self.config.task_type != TaskType.SEQ_CLS and not labels.is_floating_point():
            if labels.shape == (batch, length):
                kwargs["labels"] = F.pad(labels, (self.N, 0), value=-100)

    def _prepend(self, kwargs, keys, prompt: torch.Tensor, embeddings: nn.Module) -> None:
        ids, embeds = kwargs.get(keys["input_ids"]), kwargs.get(keys["inputs_embeds"])
        if ids is None:
            kwargs[keys["inputs_embeds"]] = torch.cat([prompt.to(embeds), embeds], dim=1)
            return
        kwargs[keys["input_ids"]] = F.pad(ids, (self.N, 0), value=self._placeholder())
        self.waiting.setdefault(embeddings, []).append(prompt)

    def _placeholder(self) -> int:
        """A token that nothing is made of: neither padding nor an end, nor the place of an image."""
        config = {**vars(self.model.config), **vars(self.model.config.get_text_config())}
        special = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
        taken = {token for value in special for token in (value if isinstance(value, (list, tuple)) else [value])}
        return next(token for token in range(len(taken) + 1) if token not in taken)

    def _after_embedding(self, module, args, output):
        if not self.waiting.get(module):
            return output
        prompt = self.waiting[module].pop(0).to(output)
        return torch.cat([prompt, output[:, self.N :]], dim=1)

    def _fill_cache(self, kwargs: dict[str, Any], prefix: torch.Tensor) -> None:
        """Write a prefix, (B, N, D), into the cache that the model will go on with."""
        if self.model.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise ValueError(
                "Prefix tuning needs the cache, which models drop with gradient checkpointing: switch that off "
                "(gradient_checkpointing_disable(), or gradient_checkpointing=False in a trainer's arguments), or use "
                "prompt tuning"
            )
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = new_cache(self.model.config)
        self.cache, self.drops_cache = kwargs["past_key_values"], kwargs.get("use_cache") is False
        dtype = next(p.dtype for p in self.model.get_input_embeddings().parameters())
        fill_cache(self.cache, prefix.to(dtype), self.config)

    def _after_model(self, module, args, output):
        if any(self.waiting.values()) or (self.cache is not None and self.cache.get_seq_length() <= self.N):
            raise RuntimeError(
                f"{type(module).__name__} has not read the prompt: it does not "
                + ("use its cache" if self.kind == "key_values" else "call its word embeddings")
                + f" in this call, so {self.config.peft_type} cannot be used with it"
            )
        if self.drops_cache and isinstance(output, dict):
            output["past_key_values"] = None  # or `generate` would go on with it
        if self.labels is None:
            return output
        logits = output["logits"] if isinstance(output, dict) else output[0]
        loss = self.own_loss.loss(logits, self.labels, self.input_type_mask)
        if isinstance(output, dict):
            return type(output)(**{"loss": loss, **{key: value for key, value in output.items() if key != "loss"}})
        return (loss, *output)


def _shape(tensor: torch.Tensor) -> tuple[int, int, torch.device]:
    return tensor.shape[0], tensor.shape[1], tensor.device


def _shape_of(kwargs: dict[str, Any], keys: dict[str, str]) -> tuple[int, int, torch.device]:
    """`(rows, tokens, device)` of what the model is to read."""
    # A decoder without inputs of its own makes them out of the encoder's.
    for key in (keys["input_ids"], keys["inputs_embeds"], "input_ids", "inputs_embeds"):
        if kwargs.get(key) is not None:
            return _shape(kwargs[key])
    raise ValueError(f"A model with a prompt adapter needs {keys['input_ids']} or {keys['inputs_embeds']}")


def _refuse_packed(mask: torch.Tensor | None, positions: torch.Tensor | None, lengths: torch.Tensor | None) -> None:
    """Refuse rows of several texts: of these positions start again, or the lengths are given."""
    is_packed = lengths is not None
    if positions is not None and positions.dim() == 2:
        falls = positions[:, 1:] < positions[:, :-1]
        if mask is not None and mask.dim() == 2:  # those of padding may be anything
            attended = mask[:, -positions.shape[1] :].bool()
            falls = falls & attended[:, 1:] & attended[:, :-1]
        is_packed |= bool(falls.any())
    if is_packed:
        raise ValueError(
            "Several texts are packed into a row, of which only the first would have the prompt: give one text per row "
            "(packing=False and padding_free=False in TRL)"
        )


def _padded_left(mask: torch.Tensor) -> bool:
    """Whether something is attended to behind a token that is not."""
    return bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any())


def _counts_by_ids(model: nn.Module) -> bool:
    """Whether a model counts its positions by the token ids, from its padding token on (RoBERTa and its like)."""
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    )


# Key-values


def new_cache(config):
    """An empty cache for a model with this configuration."""
    from transformers import DynamicCache, EncoderDecoderCache

    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=config)


def fill_cache(cache, prefix: torch.Tensor, config) -> None:
    """Write a prefix, (B, N, layers x 2 x heads x head size), into a cache; of an encoder-decoder into its decoder's.

    With `num_transformer_submodules=2` layer i has the tensors 4i and 4i + 1 of 2 x layers, counted round and round:
    the order is that of upstream's files.
    """
    heads, count = config.num_attention_heads, 2 * config.num_layers
    tensors = prefix.view(*prefix.shape[:2], count, heads, -1).permute(2, 0, 3, 1, 4)
    own = getattr(cache, "self_attention_cache", cache)
    for layer in range(config.num_layers):
        at = 2 * layer * config.num_transformer_submodules % count
        own.update(tensors[at], tensors[at + 1], layer)
