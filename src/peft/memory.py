"""How much memory training takes, before any weight is loaded: `estimate_memory` and `peft memory`.

There is no formula for an architecture or a method here. The model is built from its configuration, the adapter is put
on it, and one training step is played with fake tensors, which have shapes and types but no numbers: forward, loss,
backward, and the optimiser's own `step`. A meter sees every storage come and go. So what autograd keeps for the
backward pass, what checkpointing computes again, what an optimiser allocates is what the code that trains would do.

Formulas are used only for what one process cannot play: packed weights (`_PackedLinear`), and what ZeRO, FSDP and
off-loading move away (`_place`).

Not in the estimate: what lies outside of torch's allocator (the CUDA context, 0.3 to 1 GB; communication buffers), what
kernels allocate inside (workspaces of matrix products), fragmentation, and the data.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .auto import AutoPeftModel
from .cli.common import format_bytes, format_table
from .config import PeftConfig
from .mapping_func import get_peft_model
from .status import count_parameters
from .tuners.sft import gradients, kernels
from .tuners.sft.optimizer import SftAdamW, SftSM3
from .tuners.sft.parallel import refusal
from .tuners.sft.selector import SftSelector, named_deltas
from .utils.other import enable_checkpointing, prepare_model_for_kbit_training
from .utils.peft_types import PeftType, TaskType
from .utils.quantization_utils import QuantizationBackend, register_backend

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PARTS = ("weights", "gradients", "optimizer", "activations", "temporaries", "communication")
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd", "adafactor", "sft_adamw", "sft_sm3")
QUANTIZATIONS = ("nf4", "fp4", "int8")
SHARDINGS = ("zero1", "zero2", "zero3", "fsdp")
OFFLOADS = ("optimizer", "all")
LIVE_PARAMETERS = 10**9
"""Gathered parameters that ZeRO-3 keeps before it lets some go: DeepSpeed's default of `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training step takes at its peak, in bytes."""

    gpu: dict[str, int]
    """On each GPU (or in the memory of the CPU that trains), by part: "weights" as stored; "gradients" of what is
    trained; "optimizer", its state; "activations", what forward leaves for backward; "temporaries", everything else
    that lives at that moment; "communication", what several GPUs need to exchange or gather."""

    cpu: dict[str, int]
    """In the memory of the machine, by part: what has been off-loaded, of all GPUs together."""

    parameters: int
    """All numbers in the model; packed weights count those they encode."""

    trained: int
    """Those that are trained."""

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    @property
    def cpu_total(self) -> int:
        return sum(self.cpu.values())

    def __str__(self) -> str:
        """A table of what there is."""
        rows = [(part, self.gpu[part], self.cpu[part]) for part in PARTS if self.gpu[part] or self.cpu[part]]
        rows.append(("total", self.gpu_total, self.cpu_total))
        cells = [(part, *(format_bytes(size) if size else "-" for size in sizes)) for part, *sizes in rows]
        table = format_table(cells, ["", "each GPU", "CPU"], right=(1, 2))
        return f"{table}\n\n{self.trained:,} of {self.parameters:,} parameters trained"


def estimate_memory(
    model: str | PretrainedConfig,
    peft_config: PeftConfig | None = None,
    *,
    batch_size: int = 8,
    sequence_length: int = 512,
    task_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    mixed_precision: bool = False,
    quantization: str | None = None,
    optimizer: str | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation: bool = False,
    padding: bool = False,
    device: str = "cuda",
    num_gpus: int = 1,
    sharding: str | None = None,
    offload: str | None = None,
) -> MemoryEstimate:
    """Estimate the peak of memory in training. Needs the model's configuration only; takes some seconds.

    Args:
        model: A configuration of transformers (`model.config`), or a folder or hub id that has one.
        peft_config: The adapter; None: full fine-tuning.
        batch_size: Sequences in one forward pass of one GPU.
        sequence_length: Tokens in each; for encoder-decoder models, of input and of target.
        task_type: Which head and loss the model has ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", ...). None: the adapter's,
            else causal language modelling, or sequence to sequence where the model has encoder and decoder.
        dtype: Of the weights, and with `quantization` of the computation; None: the configuration's, else float32.
        mixed_precision: Train in bfloat16 with float32 weights. On one GPU and with data parallelism this is autocast;
            with `sharding` the weights are bfloat16 and the optimiser has a float32 copy of them.
        quantization: The linear layers of the frozen base are packed as by bitsandbytes: "nf4" (QLoRA) or "fp4" with
            double quantisation, or "int8"; the rest of the base is float32, as `prepare_model_for_kbit_training`
            makes it.
        optimizer: "adamw", "adamw_8bit", "sgd", "adafactor", "sft_adamw" or "sft_sm3". None: "adamw", or for SFT the
            one that its selection algorithm needs.
        gradient_checkpointing: Activations inside of blocks are computed twice instead of kept.
        gradient_accumulation: Update steps have several forward passes, so that gradients exist in most of them.
        padding: Batches come with an attention mask.
        device: "cuda" or "cpu", on which attention with dropout keeps more.
        num_gpus: With `sharding` None they train by data parallelism (DDP).
        sharding: "zero1", "zero2", "zero3" (DeepSpeed) or "fsdp".
        offload: "optimizer": the optimiser's state and the gradients it takes are held by the CPU; "all": the weights
            as well. Needs `sharding`.

    Raises:
        ValueError: An argument is out of its range, or two do not go together.
        TypeError: `model` is neither.
        NotImplementedError: The model's step depends on numbers, or on operations that fake tensors do not have.
    """
    _check_values(
        {"batch_size": batch_size, "sequence_length": sequence_length, "num_gpus": num_gpus},
        {"quantization": (quantization, QUANTIZATIONS), "optimizer": (optimizer, OPTIMIZERS),
         "sharding": (sharding, SHARDINGS), "offload": (offload, OFFLOADS)},
    )  # fmt: skip
    _check_combination(peft_config, dtype, mixed_precision, quantization, device, sharding, offload)
    halved = mixed_precision and sharding is not None  # 16-bit weights, and the optimiser has wide copies
    kind = torch.bfloat16 if halved else torch.float32 if mixed_precision and not quantization else dtype
    config = _read(model)
    task_type = task_type or getattr(peft_config, "task_type", None)
    task_type = task_type or (TaskType.SEQ_2_SEQ_LM if config.is_encoder_decoder else TaskType.CAUSAL_LM)
    trained = _build(config, task_type, kind, quantization, gradient_checkpointing)
    if peft_config is not None:
        with torch.device("meta"):
            trained = get_peft_model(trained, copy.deepcopy(peft_config)).train()  # the tuner fills the copy in
    algorithm = getattr(peft_config, "selection_algorithm", None)  # SFT's
    try:
        played = _play(
            trained.to(kind) if halved else trained,
            peft_config,
            optimizer or {"rigl": "sft_adamw", "sm3": "sft_sm3"}.get(algorithm, "adamw"),
            lambda: _batch(task_type, peft_config, batch_size, sequence_length, padding),
            autocast=mixed_precision and not halved,
            halved=halved,
            accumulated=gradient_accumulation,
            like_cuda=device == "cuda",
        )
    except RuntimeError as error:  # also what fake tensors raise where numbers decide what happens
        raise NotImplementedError(
            f"A training step of {config.model_type} cannot be played with fake tensors: {error}"
        ) from error
    return _place(played, num_gpus, sharding, offload)


def _check_values(counts: dict[str, int], choices: dict[str, tuple[str | None, Sequence[str]]]) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    for name, (value, allowed) in choices.items():
        if value is not None and value not in allowed:
            raise ValueError(f"{name} must be None or one of {', '.join(allowed)}, got {value!r}")


def _check_combination(
    peft_config: PeftConfig | None,
    dtype: torch.dtype | str | None,
    mixed_precision: bool,
    quantization: str | None,
    device: str,
    sharding: str | None,
    offload: str | None,
) -> None:
    """Refuse what cannot be trained."""
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}")
    if mixed_precision and not quantization and dtype not in (None, "float32", torch.float32):
        raise ValueError(f"mixed_precision trains float32 weights in bfloat16, so dtype={dtype!r} cannot be given too")
    if quantization and peft_config is None:
        raise ValueError(f"quantization={quantization!r} packs weights that stay frozen: it needs a peft_config")
    if offload and sharding is None:
        raise ValueError(
            f"offload={offload!r} is something that DeepSpeed and FSDP do, for one GPU too: choose one by sharding"
        )
    if offload == "all" and sharding not in ("zero3", "fsdp"):
        raise ValueError(
            f"offload='all' moves the weights away, which sharding={sharding!r} cannot do: use 'zero3' or 'fsdp', or "
            f"offload='optimizer'"
        )
    if offload == "optimizer" and sharding == "fsdp":
        raise ValueError("FSDP moves weights and optimizer state away together: use offload='all'")
    if sharding and getattr(peft_config, "peft_type", None) == PeftType.SFT:
        raise ValueError(refusal(f"sharding={sharding!r}"))
    if getattr(peft_config, "search", None) is not None:
        raise ValueError(
            "a structure is searched for with the model's weights, which are not here: give best_structure"
        )
    if getattr(peft_config, "peft_type", None) == PeftType.FINETUNA:
        raise ValueError("models of finetuna are not estimated: the nearest is LoRA with quantization='int8'")


# ---- The model and what it is given ----


def _read(model: str | PretrainedConfig) -> PretrainedConfig:
    """A copy of the model's configuration, as Trainer sets it."""
    from transformers import AutoConfig, PretrainedConfig

    if not isinstance(model, (str, PretrainedConfig)):
        raise TypeError(
            f"model must be a configuration of transformers (model.config), or a folder or hub id that has one, got "
            f"{type(model).__name__}"
        )
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else copy.deepcopy(model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "the configuration is that of packed weights, which are not read here: take the configuration of the "
            "model in the clear, and say quantization='nf4', 'fp4' or 'int8'"
        )
    config.use_cache = False
    return config


def _build(
    config: PretrainedConfig,
    task_type: str,
    dtype: torch.dtype | str | None,
    quantization: str | None,
    gradient_checkpointing: bool,
) -> PreTrainedModel:
    """The base model on the meta device, in training mode."""
    dtype = dtype or (torch.bfloat16 if quantization else config.dtype) or torch.float32
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type of torch or its name, got {dtype!r}")
    auto = AutoPeftModel.base_class(PeftConfig(task_type=task_type))
    with torch.device("meta"):
        base = auto.from_config(config, dtype=dtype)
        if quantization:
            _pack(base, quantization, dtype)
            prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    if gradient_checkpointing:
        enable_checkpointing(base, {"use_reentrant": False})
    return base.train()


def _batch(task_type: str, peft_config: PeftConfig | None, rows: int, length: int, padding: bool) -> dict[str, Tensor]:
    """What the forward of a model for this task takes in training."""
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    batch = {"input_ids": tokens}
    if padding:
        batch["attention_mask"] = torch.ones_like(tokens)
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS"):
        batch["labels"] = torch.zeros_like(tokens)
    elif task_type == "SEQ_CLS":
        batch["labels"] = tokens.new_zeros(rows)
    elif task_type == "QUESTION_ANS":
        batch |= {name: tokens.new_zeros(rows) for name in ("start_positions", "end_positions")}
    if hasattr(peft_config, "num_tasks"):
        batch["task_ids"] = tokens.new_zeros(rows)
    return batch


class _PackedLinear(nn.Linear):
    """A linear layer of bitsandbytes as far as memory goes: what it stores, what it makes, what it keeps for backward.

    "nf4", "fp4": 4 bits per weight, an 8-bit scale for each 64 weights, and a 32-bit scale for each 256 of these
    (QLoRA, arXiv 2305.14314, section 3). "int8": 8 bits per weight and a 32-bit scale for each output (arXiv
    2208.07339, section 2).
    """

    def __init__(self, layer: nn.Linear, quantization: str, dtype: torch.dtype):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
        self.quantization, self.dtype = quantization, dtype
        numel, has_4_bits = layer.weight.numel(), quantization != "int8"
        packed = torch.empty(-(-numel // 2) if has_4_bits else layer.weight.shape, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        scales = -(-numel // 64) + -(-numel // (64 * 256)) * 4 if has_4_bits else layer.out_features * 4
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x.to(self.dtype), self.weight, self.bias, self).to(x.dtype)

    def unpacked(self) -> Tensor:
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)


register_backend(
    QuantizationBackend(
        "bitsandbytes in outline",
        lambda layer: isinstance(layer, _PackedLinear),
        _PackedLinear.unpacked,
        casts_input=True,
    )
)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.layer = layer
        if layer.quantization != "int8":
            return F.linear(x, layer.unpacked(), None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x)  # LLM.int8 keeps it even though the weight is frozen
        rounded = x.to(torch.int8)
        product = rounded.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
        return product.to(x.dtype)

    @staticmethod
    def backward(ctx, gy):
        return gy @ ctx.layer.unpacked(), None, None, None


def _pack(model: PreTrainedModel, quantization: str, dtype: torch.dtype) -> None:
    """Exchange the linear layers that transformers packs: all but the output layer and what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not any(name == key or name.startswith(f"{key}.") for key in kept):
            model.set_submodule(name, _PackedLinear(layer, quantization, dtype))


# ---- Operations whose result depends on numbers, which fake tensors do not have ----


def _searchsorted(numbers: Tensor, wanted: Tensor, **options: Any) -> Tensor:
    places = torch.ops.aten.searchsorted.Tensor(numbers, wanted, **options)
    places.untyped_storage().spread = numbers.numel()  # for `_scalar`
    return places


def _scalar(tensor: Tensor) -> bool | int | float:
    """A number out of a tensor. Conditions hold, and what is searched in a sorted list is found at equal distances."""
    spread = getattr(tensor.untyped_storage(), "spread", None)
    if spread is not None:
        places = tensor.untyped_storage().nbytes() // tensor.element_size()
        return spread * tensor.storage_offset() // max(1, places - 1)
    return True if tensor.dtype == torch.bool else 1


_STAND_INS: dict[Any, Callable] = {
    torch.ops.aten._local_scalar_dense.default: _scalar,
    torch.ops.aten.searchsorted.Tensor: _searchsorted,
    # A check that finds nothing, as the checks of healthy training do.
    torch.ops.aten.nonzero.default: lambda tensor: tensor.new_empty(0, tensor.dim(), dtype=torch.int64),
    # There are no fake sparse tensors in compressed form; their values alone stand for them.
    torch.ops.aten.sparse_compressed_tensor.comp_plain_value_size: lambda starts, columns, values, *_, **__: values,
    torch.ops.aten.sparse_sampled_addmm.out: lambda values, left, right, *, out, **_: out,
    torch.ops.aten.values.default: torch.ops.aten.alias.default,
}


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within this context `owner.name` is what `make` makes of it."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Choose, for fake tensors on the CPU, what keeps as much for backward as the kernels on CUDA.

    There, attention with dropout has fused kernels too, the mask of a dropout is one byte per number, and no product is
    sampled.
    """

    def attention(real: Callable) -> Callable:
        def attend(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
            dropout_p = 0.0 if isinstance(query, FakeTensor) else dropout_p
            return real(query, key, value, attn_mask, dropout_p, *args, **kwargs)

        return attend

    def dropout(real: Callable) -> Callable:
        def drop(x, p=0.5, training=True, inplace=False):
            if isinstance(x, FakeTensor) and training and p > 0:
                return torch.native_dropout(x, p, training)[0]
            return real(x, p, training, inplace)

        return drop

    with (
        _replaced(F, "scaled_dot_product_attention", attention),
        _replaced(F, "dropout", dropout),
        _replaced(gradients, "can_compress", lambda _: lambda tensor: False),
    ):
        yield


# ---- Playing a step ----


@dataclass
class _Played:
    """What one process holds and needs, in bytes; by part, as in `MemoryEstimate.gpu`."""

    backward: Counter[str]
    """At the peak of forward and backward."""
    step: Counter[str]
    """At the peak of the optimiser's step."""
    gradients: int
    """Of everything that is trained, when backward is over."""
    masters: int
    """The optimiser's float32 copies of 16-bit weights, which "optimizer" includes; 0: it has none."""
    halves: int
    """All weights in 16 bits, trained or not."""
    unit: tuple[int, int]
    """Weights, and trained weights, of the largest part of the model that is gathered in one piece."""
    parameters: int
    trained: int


class _Meter(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by what they are: `part` at the time when they were made.

    While it watches, autograd does not add gradients up in place, so that an embedding that is also the output layer
    may take one gradient more here than in training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "weights"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}  # by the storage's address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = _STAND_INS.get(func, func)(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:  # a sparse one is made of such
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = self.part, storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key))
        self.live[self.part] += storage.nbytes()
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _forget(self, key: int) -> None:
        part, size, _ = self._known.pop(key)
        self.live[part] -= size

    def assign(self, tensor: Tensor, part: str) -> None:
        """Count the storage of a tensor as something else from now on."""
        key = tensor.untyped_storage()._cdata
        before, size, reference = self._known[key]
        self._known[key] = part, size, reference
        self.live[before] -= size
        self.live[part] += size

    def take_peak(self) -> Counter[str]:
        """The peak since the last call, by part."""
        taken, self.peak = self.peak, self.live.copy()
        return taken


def _make_optimizer(name: str, params: list[Tensor], model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser as Trainer or SftTrainer makes it."""
    if name == "adamw":
        return torch.optim.AdamW(params, fused=True)
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params)
    if name == "sgd":
        return torch.optim.SGD(params)
    if name == "adafactor":
        from transformers import Adafactor

        return Adafactor(params, lr=1e-3, scale_parameter=False, relative_step=False)
    if name == "sft_adamw":
        return SftAdamW(params, momentum_dtype=torch.float32)
    return SftSM3(params, {delta.values: delta for delta in named_deltas(model).values()})


def _play(
    model: nn.Module,
    config: PeftConfig | None,
    optimizer_name: str,
    make_batch: Callable[[], dict[str, Tensor]],
    *,
    autocast: bool,
    halved: bool,
    accumulated: bool,
    like_cuda: bool,
) -> _Played:
    """Play one training step.

    Args:
        model: On the meta device; its parameters and buffers are exchanged for fake ones.
        config: Of its adapter.
        autocast: Forward in bfloat16.
        halved: The optimiser works on float32 copies of the parameters.
        accumulated: There are gradients already when forward begins.
        like_cuda: Prefer what CUDA's kernels would keep.
    """
    trained_count, count = count_parameters(model)
    gradients._silence_beta_warning()  # which it does once per process, and must do outside of fake tensors
    meter = _Meter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(meter)
        # Of fake matrices only those in coordinates can be multiplied; it takes no more memory to speak of.
        stack.enter_context(_replaced(kernels, "can_compress", lambda _: lambda tensor: False))
        if like_cuda:
            stack.enter_context(_cuda_kernels())
        _make_fake(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: meter.assign(p.grad, "gradients"))
        meter.part = "optimizer"
        masters = [nn.Parameter(parameter.detach().float()) for parameter in trained] if halved else trained
        optimizer = _make_optimizer(optimizer_name, masters, model)
        _start_gathering(model, config, optimizer)
        meter.part = "activations"
        batch = make_batch()
        if "attention_mask" not in batch:
            from transformers.utils import import_utils

            # transformers finds then that nothing is padded or packed and that it needs no mask, as in training. Into
            # fake tensors it does not look, which for others have no answers (see `_scalar`).
            stack.enter_context(_replaced(import_utils, "is_fake_tensor", lambda _: lambda tensor: False))
        for _ in range(1 + accumulated):
            meter.take_peak()
            meter.part = "activations"
            loss = _loss(model, batch, autocast)
            meter.part = "temporaries"
            loss.backward()
        del loss
        backward = meter.take_peak()
        for _ in range(2):  # the first step makes the state; the second is like all that follow
            meter.take_peak()
            _step(optimizer, trained, masters)
            for tensor in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
                if isinstance(tensor, Tensor):
                    meter.assign(tensor, "optimizer")
        step = meter.take_peak()
        backward["optimizer"] = step["optimizer"]
        return _Played(
            backward,
            step,
            gradients=sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None),
            masters=sum(parameter.nbytes for parameter in masters) if halved else 0,
            halves=sum(parameter.nbytes for parameter in model.parameters() if parameter.dtype == torch.bfloat16),
            unit=_largest_unit(model),
            trained=trained_count,
            parameters=count,
        )


def _make_fake(model: nn.Module) -> None:
    """Exchange what is on the meta device for fake tensors on the CPU. What is shared stays shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
                tensors[name] = made[id(tensor)]


def _start_gathering(model: nn.Module, config: PeftConfig | None, optimizer: torch.optim.Optimizer) -> None:
    """Let SFT gather gradients for a reselection, which is when it takes most."""
    if getattr(config, "selection_algorithm", "static") == "static":
        return
    try:
        SftSelector(model, optimizer, config, 10**6, grad_accumulation_steps=1, process_group=None)
    except TypeError as error:
        raise ValueError(f"{error}") from error


def _loss(model: nn.Module, batch: dict[str, Tensor], autocast: bool) -> Tensor:
    forward = model
    if autocast:
        from accelerate.utils import convert_outputs_to_fp32

        forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    output = forward(**batch)
    return output[0].sum()  # the loss, or what a model without one gives


def _step(optimizer: torch.optim.Optimizer, trained: list[Tensor], masters: list[Tensor]) -> None:
    for parameter, master in zip(trained, masters):
        if master is not parameter and parameter.grad is not None:
            master.grad = parameter.grad.float()
    optimizer.step()
    for parameter, master in zip(trained, masters):
        if master is not parameter:
            master.grad = None


def _largest_unit(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights, and of the trained ones, in the largest block or module outside of blocks."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    inside = {id(part) for block in blocks for part in block.modules()}
    units = [list(block.parameters()) for block in blocks]
    units += [list(module.parameters(recurse=False)) for module in base.modules() if id(module) not in inside]
    sizes = [(sum(p.nbytes for p in unit), sum(p.nbytes for p in unit if p.requires_grad)) for unit in units]
    return max(sizes)


# ---- Several GPUs, and the memory of the CPU ----


def _place(played: _Played, num_gpus: int, sharding: str | None, offload: str | None) -> MemoryEstimate:
    """What of it each GPU holds, and what is in the CPU's memory."""
    stage = 0 if sharding is None else 3 if sharding == "fsdp" else int(sharding[-1])
    moved = {None: (), "optimizer": ("optimizer", "gradients"), "all": ("optimizer", "gradients", "weights")}[offload]
    moments = [played.backward] if offload else [played.backward, played.step]  # else the CPU takes the step
    places = []
    for moment in moments:
        whole = {part: moment[part] for part in PARTS}
        if sharding == "fsdp" and played.masters:  # its shards are float32: weights and the optimiser's copies in one
            whole["weights"] += played.halves
            whole["gradients"] *= 2
            whole["optimizer"] -= played.masters
        shared = ("optimizer", "gradients", "weights")[:stage]
        if stage and moment is played.step:
            shared += ("temporaries",)
        gpu = {part: -(-whole[part] // num_gpus) if part in shared else whole[part] for part in PARTS}
        cpu = {part: 0 for part in PARTS}
        for part in moved:
            gpu[part], cpu[part] = 0, whole[part]
        if stage >= 2 and (num_gpus > 1 or moved):
            gpu["temporaries"] += played.unit[1]  # the gradients that are on their way
        if "gradients" in moved:  # in float32, and all of them
            cpu["gradients"] = 4 * played.trained
        gpu["communication"] = _gathered(played, moment["weights"], num_gpus, sharding, offload)
        places.append((gpu, cpu))
    gpu, cpu = max(places, key=lambda place: sum(place[0].values()))
    return MemoryEstimate(gpu, cpu, played.parameters, played.trained)


def _gathered(played: _Played, weights: int, num_gpus: int, sharding: str | None, offload: str | None) -> int:
    """Bytes of what is brought together from the other GPUs, or from the CPU, at one time."""
    if sharding is None:
        return played.gradients if num_gpus > 1 else 0  # DDP's buckets
    if num_gpus == 1 and offload != "all":
        return 0
    if sharding == "fsdp":
        return 2 * played.unit[0]  # one that computes, and the next
    if sharding == "zero3":
        return min(weights, LIVE_PARAMETERS * weights // played.parameters + played.unit[0])
    return 0
