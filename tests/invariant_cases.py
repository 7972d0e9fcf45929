"""The cases of `test_invariants.py`: every kind of layer (`OPS`) and every method (`METHODS`) with its formula.

Letters: N rows of a batch, O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    SftConfig,
    SsfConfig,
    TrainableTokensConfig,
    VeraConfig,
)

N, VOCAB = 4, 11


class TinyRMSNorm(nn.Module):
    """As Llama's: no bias, no offset."""

    offset = 0.0

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (self.offset + self.weight.to(normed.dtype))).to(x.dtype)


class OffsetRMSNorm(TinyRMSNorm):
    """As Gemma's: the weight counts from 1."""

    offset = 1.0


class Net(nn.Module):
    """One target layer, `layer`, and a second of the same kind that is never a target."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.layer = make()
        self.other = make()

    def forward(self, x):
        return self.layer(x)


@dataclass
class OpCase:
    """A kind of layer: how to make one, an input, and its function written out with weight and bias given."""

    make: Callable[[], nn.Module]
    draw: Callable[[], torch.Tensor]
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    channel_dim: int = -1
    stored_transposed: bool = False
    offset: float = 0.0


def rms_norm(x, weight, bias):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


OPS: dict[str, OpCase] = {
    "linear": OpCase(lambda: nn.Linear(6, 5), lambda: torch.randn(N, 3, 6), lambda x, W, b: x @ W.T + b),
    "linear_no_bias": OpCase(lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(N, 6), lambda x, W, b: x @ W.T),
    "Conv1D": OpCase(
        lambda: Conv1D(5, 6), lambda: torch.randn(N, 3, 6), lambda x, W, b: x @ W + b, stored_transposed=True
    ),
    "conv1d": OpCase(
        lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2),
        lambda: torch.randn(N, 4, 9),
        lambda x, W, b: F.conv1d(x, W, b, padding=1, stride=2),
        channel_dim=1,
    ),
    "conv2d": OpCase(
        lambda: nn.Conv2d(4, 6, (3, 2), padding=1, dilation=(1, 2), padding_mode="circular"),
        lambda: torch.randn(N, 4, 7, 6),
        lambda x, W, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), W, b, dilation=(1, 2)),
        channel_dim=1,
    ),
    "conv3d": OpCase(
        lambda: nn.Conv3d(4, 6, 2),
        lambda: torch.randn(N, 4, 3, 4, 3),
        lambda x, W, b: F.conv3d(x, W, b),
        channel_dim=1,
    ),
    "embedding": OpCase(
        lambda: nn.Embedding(VOCAB, 6),
        lambda: (torch.randperm(N * 5) % VOCAB).view(N, 5),  # every token: no part of an adapter goes unseen
        lambda x, W, b: W[x],
        stored_transposed=True,
    ),
    "LayerNorm": OpCase(
        lambda: nn.LayerNorm(6), lambda: torch.randn(N, 3, 6), lambda x, W, b: F.layer_norm(x, (6,)) * W + b
    ),
    "RMSNorm": OpCase(lambda: TinyRMSNorm(6), lambda: torch.randn(N, 3, 6), rms_norm),
    "OffsetRMSNorm": OpCase(
        lambda: OffsetRMSNorm(6), lambda: torch.randn(N, 3, 6), lambda x, W, b: rms_norm(x, 1 + W, b), offset=1.0
    ),
}
NORMS = ("LayerNorm", "RMSNorm", "OffsetRMSNorm")
MATRICES = tuple(op for op in OPS if op not in NORMS)


# Each method's formula: (op, stored weight, bias, parameters by their path in the layer, x) -> output


def lora_formula(op: OpCase, W, b, parameters, x, scaling=2.0):
    """arXiv 2106.09685, eq. 3: `W + scaling B A`."""
    if "lora_embedding_A" in parameters:
        A, B = parameters["lora_embedding_A"], parameters["lora_embedding_B"]
    else:
        A, B = parameters["lora_A.weight"], parameters["lora_B.weight"]
    delta = scaling * torch.tensordot(B.reshape(B.shape[0], B.shape[1]), A, dims=1)
    return op.function(x, W + (delta.T if op.stored_transposed else delta), b)


def dora_formula(op: OpCase, W, b, parameters, x, scaling=2.0):
    """arXiv 2402.09353, eq. 5, with the norm a constant (section 4.3)."""
    if "lora_embedding_A" in parameters:
        A, B = parameters["lora_embedding_A"], parameters["lora_embedding_B"]
    else:
        A, B = parameters["lora_A.weight"], parameters["lora_B.weight"]
    view = W.T if op.stored_transposed else W
    V = view + scaling * torch.tensordot(B.reshape(B.shape[0], B.shape[1]), A, dims=1)
    norm = V.detach().square().sum(dim=tuple(range(1, V.dim())), keepdim=True).sqrt()
    V = V * parameters["lora_magnitude_vector.weight"].reshape(norm.shape) / norm
    return op.function(x, V.T if op.stored_transposed else V, b)


def sft_formula(op: OpCase, W, b, parameters, x):
    """arXiv 2401.16405, section 3: `W` with the values added at the positions."""
    flat = torch.zeros(W.numel(), dtype=W.dtype).scatter_add(
        0, parameters["sft_delta.indices"].long(), parameters["sft_delta.values"]
    )
    return op.function(x, W + flat.view(W.shape), b)


def sft_groups_formula(granularity: str, b: int = 2):
    """`W` with whole output channels, input channels or b x b tiles of `W[O, I, ...]` added."""

    def formula(op: OpCase, W, b_, parameters, x):
        view = W.T if op.stored_transposed else W
        delta = torch.zeros_like(view)
        for number, values in zip(parameters["sft_delta.indices"].tolist(), parameters["sft_delta.values"]):
            one = torch.zeros_like(view)
            if granularity == "row":
                one[number] = 1
            elif granularity == "column":
                one[:, number] = 1
            else:
                row, column = divmod(number, view.shape[1] // b)
                one[row * b : (row + 1) * b, column * b : (column + 1) * b] = 1
            delta = delta.masked_scatter(one.bool(), values)
        return op.function(x, W + (delta.T if op.stored_transposed else delta), b_)

    return formula


def _stored(op: OpCase, delta, W):
    """A change of `W[O, I, ...]` as the layer stores its weight."""
    return delta.T if op.stored_transposed else delta.reshape(W.shape)


def kernel_factors(t, b, a):
    """arXiv 2108.06098, proposition 3: the sum over both ranks of `t[i, j] a_i b_j`, written out."""
    ranks = [(i, j) for i in range(t.shape[0]) for j in range(t.shape[1])]
    terms = (torch.einsum("o,c,...->oc...", a[i], b[j], t[i, j]) for i, j in ranks)
    return sum(terms)


def loha_formula(op: OpCase, W, b, parameters, x, scaling=2.0):
    """arXiv 2108.06098, propositions 1 and 3."""
    a1, b1, a2, b2 = (parameters[f"hada_w{name}"] for name in ("1_a", "1_b", "2_a", "2_b"))
    if "hada_t1" in parameters:
        delta = kernel_factors(parameters["hada_t1"], b1, a1) * kernel_factors(parameters["hada_t2"], b2, a2)
    else:
        delta = (a1 @ b1) * (a2 @ b2)
    return op.function(x, W + scaling * _stored(op, delta, W), b)


def lokr_formula(op: OpCase, W, b, parameters, x, scaling=2.0):
    """arXiv 2309.14859: blocks `w1[i, j] w2`."""
    w1, w2 = (
        parameters[f"lokr_w{i}"]
        if f"lokr_w{i}" in parameters
        else parameters[f"lokr_w{i}_a"] @ parameters[f"lokr_w{i}_b"]
        if not (i == 2 and "lokr_t2" in parameters)
        else kernel_factors(parameters["lokr_t2"], parameters["lokr_w2_b"], parameters["lokr_w2_a"])
        for i in (1, 2)
    )
    # For a whole w2 of a 1-d convolution upstream takes one product for each of its rows (I2, K).
    blocks = [part.view(1, *part.shape) for part in w2] if w2.dim() == 3 else [w2]
    rows, columns = (1, 2) if w2.dim() == 3 else (0, 1)
    delta = torch.cat(
        [
            torch.cat([torch.cat([w1[i, j] * v for j in range(w1.shape[1])], columns) for i in range(len(w1))], rows)
            for v in blocks
        ]
    )
    return op.function(x, W + scaling * _stored(op, delta, W), b)


def ssf_formula(op: OpCase, W, b, parameters, x):
    """arXiv 2210.08823, eq. 4: scale and shift per output channel."""
    y = op.function(x, W, b)
    scale, shift = (parameters[name].reshape(-1, *([1] * (y.dim() - 2))) if op.channel_dim == 1 else parameters[name]
                    for name in ("ssf_scale", "ssf_shift"))  # fmt: skip
    return y * scale + shift


def adalora_formula(op: OpCase, W, b, parameters, x, scaling=8 / (4 + 1e-5)):
    """arXiv 2303.10512, section 3.1: `W + P diag(E) Q`, divided by the initial rank as in LoRA."""
    A, B, E = (parameters[f"lora_{name}"] for name in "ABE")
    return op.function(x, W + scaling * _stored(op, B @ torch.diag(E[:, 0]) @ A, W), b)


def vera_formula(op: OpCase, W, b, parameters, x, r=5, key=7):
    """arXiv 2310.11454, eq. 2; A and B are the first draws of a generator, uniform with the variance 2 / columns."""
    view = (W.T if op.stored_transposed else W).flatten(1)  # (O, I K)
    generator = torch.Generator().manual_seed(key)
    A, B = (
        torch.empty(shape).uniform_(-((6 / shape[1]) ** 0.5), (6 / shape[1]) ** 0.5, generator=generator).double()
        for shape in ((r, view.shape[1]), (len(view), r))
    )
    delta = torch.diag(parameters["vera_lambda_b"]) @ B @ torch.diag(parameters["vera_lambda_d"]) @ A
    return op.function(x, W + _stored(op, delta, W), b)


def ia3_formula(op: OpCase, W, b, parameters, x):
    """arXiv 2205.05638, section 3.3: factors on the features of the output."""
    y, factors = op.function(x, W, b), parameters["ia3_l"].flatten()
    return y * (factors.reshape(-1, *([1] * (y.dim() - 2))) if op.channel_dim == 1 else factors)


def ia3_feedforward_formula(op: OpCase, W, b, parameters, x):
    """The same on the features of the input."""
    factors = parameters["ia3_l"].flatten()
    return op.function(x * (factors.reshape(-1, *([1] * (x.dim() - 2))) if op.channel_dim == 1 else factors), W, b)


def ln_tuning_formula(op: OpCase, W, b, parameters, x):
    """arXiv 2312.11420, section 3: the layer with weights of its own."""
    return op.function(x, parameters["ln_tuning_layers.weight"], parameters.get("ln_tuning_layers.bias"))


def _rotated(op: OpCase, W, R):
    """`W R^T` over all that an output channel sees of the input, in the orientation in which the layer stores it."""
    view = W.T if op.stored_transposed else W
    turned = (view.flatten(1) @ R.T).reshape(view.shape)
    return turned.T if op.stored_transposed else turned


def oft_formula(exact: bool):
    """arXiv 2506.19847, eq. 4: `W R^T`, and for tables `R^T W`, with skew-symmetric blocks from rows of parameters."""

    def formula(op: OpCase, W, b, parameters, x):
        blocks = []
        for row in next(iter(parameters.values())):
            size = int((1 + (1 + 8 * len(row)) ** 0.5) / 2)
            pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
            eye = torch.eye(size, dtype=W.dtype)
            S = sum(v * (torch.outer(eye[i], eye[j]) - torch.outer(eye[j], eye[i])) for v, (i, j) in zip(row, pairs))
            powers = [torch.linalg.matrix_power(S, k) for k in range(5)]
            approximate = powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + powers[4]
            blocks.append((eye - S) @ torch.linalg.inv(eye + S) if exact else approximate)
        R = torch.block_diag(*blocks)
        if "oft_embedding_R.weight" in parameters:
            return op.function(x, W @ R, b)  # W is the table, (tokens, features)
        return op.function(x, _rotated(op, W, R), b)

    return formula


def boft_formula(op: OpCase, W, b, parameters, x):
    """arXiv 2311.06243, eq. 3: factor i has blocks of half blocks that are 2^i half blocks apart."""
    A, s = parameters["boft_R"], parameters["boft_s"].flatten()
    size = A.shape[-1]
    eye, halves = torch.eye(size, dtype=W.dtype), 2 * A.shape[1]
    R = torch.eye(A.shape[1] * size, dtype=W.dtype)
    for i, blocks in enumerate(A):
        factor = torch.zeros_like(R)
        left = [u for u in range(halves) if not u & 2**i]
        for a, u in zip(blocks, left):
            v = u + 2**i
            features = [*range(u * size // 2, (u + 1) * size // 2), *range(v * size // 2, (v + 1) * size // 2)]
            S = (a - a.T) / 2
            factor[torch.tensor(features)[:, None], features] = (eye - S) @ torch.linalg.inv(eye + S)
        R = R @ factor
    scale = s if op.stored_transposed else s.view(-1, *[1] * (W.dim() - 1))
    return op.function(x, _rotated(op, W, R) * scale, b)


def bottleneck_formula(parallel: bool):
    """arXiv 1902.00751, section 2.1, and 2110.04366, section 3.1."""

    def formula(op: OpCase, W, b, parameters, x):
        y = op.function(x, W, b)
        h = (x if parallel else y).movedim(op.channel_dim, -1)
        down, up = ([parameters[f"bottleneck_{n}.{part}"] for part in ("weight", "bias")] for n in ("down", "up"))
        change = (h @ down[0].T + down[1]).clamp(min=0) @ up[0].T + up[1]
        return y + (parameters["bottleneck_scale"] if parallel else 0.5) * change.movedim(-1, op.channel_dim)

    return formula


def trainable_tokens_formula(op: OpCase, W, b, parameters, x, tokens=(3, 0, 4)):
    """Some rows of the table, or outputs of the head, with weights of their own."""
    rows = dict(zip(tokens, parameters["trainable_tokens_delta"]))
    is_head = b is not None or x.is_floating_point()
    W = W.T if op.stored_transposed and is_head else W
    W = torch.stack([rows.get(i, row) for i, row in enumerate(W)])
    return op.function(x, W.T if op.stored_transposed and is_head else W, b)


@dataclass
class MethodCase:
    """A method: its configuration, its formula, what it can do, and configurations that it refuses."""

    config: Callable[..., object]
    formula: Callable
    ops: tuple[str, ...] = tuple(OPS)
    some_ops: bool = False  # others work as well, with other sizes
    merges: bool = True
    unmerges_exactly: bool = False
    combines: bool = True  # several adapters can be active at a time
    bad: tuple[tuple[dict, str], ...] = ()
    wide: dict = field(default_factory=dict)  # what makes the parameters as wide as a float64 base


BAD_LYCORIS = (
    ({"r": 0}, "rank must be a positive whole number, got r=0"),
    ({"alpha": 0}, "alpha scales the delta, so it must be finite and not 0, got 0"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
    ({"rank_dropout": 1.0}, r"rank_dropout must be in \[0, 1\), got 1.0"),
    ({"module_dropout": -0.1}, "got -0.1"),
)
METHODS: dict[str, MethodCase] = {
    "lora": MethodCase(
        lambda **kw: LoraConfig(**{"r": 4, "lora_alpha": 8, **kw}),
        lora_formula,
        ops=MATRICES,
        bad=(
            ({"r": 0}, "rank must be a positive whole number, got r=0"),
            ({"r": -3}, "got r=-3"),
            ({"r": 2.5}, "r must be int, got 2.5"),
            ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
            ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
            ({"lora_dropout": -0.1}, "got -0.1"),
            ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', got 'some'"),
            ({"init_lora_weights": "best"}, "init_lora_weights must be .* got 'best'"),
        ),
    ),
    "dora": MethodCase(
        lambda **kw: LoraConfig(r=4, lora_alpha=8, use_dora=True, **kw),
        dora_formula,
        ops=MATRICES,
        unmerges_exactly=True,
        bad=(({"lora_bias": True}, "lora_bias=True has no place in DoRA"),),
    ),
    "loha": MethodCase(
        lambda **kw: LoHaConfig(**{"r": 3, "alpha": 6, "use_effective_conv2d": True, **kw}),
        loha_formula,
        ops=MATRICES,
        bad=(
            *BAD_LYCORIS,
            ({"init_weights": "lycoris"}, "init_weights must be bool, got 'lycoris'"),
        ),
    ),
    "lokr": MethodCase(
        lambda **kw: LoKrConfig(**{"r": 1, "alpha": 2, "use_effective_conv2d": True, **kw}),
        lokr_formula,
        ops=MATRICES,
        bad=(
            *BAD_LYCORIS,
            ({"init_weights": "best"}, "init_weights must be True, False or 'lycoris', got 'best'"),
            ({"decompose_factor": 0}, "decompose_factor must be -1 or at least 1, got 0"),
        ),
    ),
    "sft": MethodCase(
        lambda **kw: SftConfig(**{"num_tunable_weights": 5, **kw}),
        sft_formula,
        unmerges_exactly=True,
        wide={"dtype": "auto"},
        bad=(
            ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
            ({"density": 1.5}, "got 1.5"),
            ({"num_tunable_weights": 0}, "num_tunable_weights must be at least 1, got 0"),
            ({"num_deltas": {"layer": -1}}, r"num_deltas\['layer'\] must be a whole number >= 0, got -1"),
            ({"selection_algorithm": "best"}, "selection_algorithm must be 'rigl', 'sm3' or 'static', got 'best'"),
            ({"reselection_rate_policy": "step"}, "reselection_rate_policy must be 'linear' or 'cosine', got 'step'"),
            ({"dtype": "int8"}, "dtype must be 'float32', .* or 'auto', got 'int8'"),
            ({"selection_accumulation_steps": 20}, r"must be in 1..reselection_steps-1 = 1..19, got 20"),
            ({"selection_accumulation_steps": 0}, "got 0"),
            ({"reselection_steps": 1}, "reselection_steps must be at least 2, got 1"),
            ({"initial_reselection_rate": 1.1}, r"initial_reselection_rate must be in \[0, 1\], got 1.1"),
        ),
    ),
    "sft_row": MethodCase(
        lambda **kw: SftConfig(**{"density": 0.3, "granularity": "row", **kw}),
        sft_groups_formula("row"),
        ops=MATRICES,
        unmerges_exactly=True,
        wide={"dtype": "auto"},
        bad=(
            ({"granularity": "rows"}, "granularity must be 'element', .* or 'block', got 'rows'"),
            ({"block_size": 8}, "block_size=8 has no meaning with granularity='row'"),
        ),
    ),
    "sft_column": MethodCase(
        lambda **kw: SftConfig(**{"density": 0.3, "granularity": "column", **kw}),
        sft_groups_formula("column"),
        ops=MATRICES,
        unmerges_exactly=True,
        wide={"dtype": "auto"},
    ),
    "sft_block": MethodCase(
        lambda **kw: SftConfig(**{"num_tunable_weights": 12, "granularity": "block", "block_size": 2, **kw}),
        sft_groups_formula("block"),
        ops=("linear", "linear_no_bias", "Conv1D", "embedding"),
        unmerges_exactly=True,
        wide={"dtype": "auto"},
        bad=(
            ({"block_size": 0}, "block_size must be at least 1, got 0"),
            ({"block_size": 2.0}, "got 2.0"),
        ),
    ),
    "ssf": MethodCase(
        lambda **kw: SsfConfig(**kw),
        ssf_formula,
        unmerges_exactly=True,
        bad=(
            ({"bias": "ssf_only"}, "bias must be 'none', 'all' or None, got 'ssf_only'"),
            ({"init_ssf_weights": "uniform"}, "init_ssf_weights must be True or 'normal', got 'uniform'"),
            ({"init_ssf_weights": False}, "got False"),
        ),
    ),
    "adalora": MethodCase(
        lambda **kw: AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 10, **kw}),
        adalora_formula,
        ops=MATRICES,
        bad=(
            ({"total_step": None}, "total_step must be the number of training steps, got None"),
            ({"total_step": 5, "tinit": 3, "tfinal": 2}, "leave none of total_step=5"),
            ({"init_r": 0}, "target_r must be in 1..init_r, got target_r=2 and init_r=0"),
            ({"target_r": 5}, "got target_r=5 and init_r=4"),
            ({"tinit": -1}, "tinit must be at least 0, got -1"),
            ({"deltaT": 0}, "deltaT must be at least 1, got 0"),
            ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
            ({"orth_reg_weight": -0.5}, "orth_reg_weight must be at least 0, got -0.5"),
            ({"use_rslora": True}, "use_rslora=True has no effect in AdaLoRA"),
            ({"alpha_pattern": {"q": 2.0}}, "alpha_pattern=.* has no effect in AdaLoRA"),
            ({"init_lora_weights": "gaussian"}, "init_lora_weights must be True or False in AdaLoRA, got 'gaussian'"),
            ({"rank_pattern": {"q": 4}}, "rank_pattern must be"),
        ),
    ),
    "vera": MethodCase(
        lambda **kw: VeraConfig(**{"r": 5, "projection_prng_key": 7, **kw}),
        vera_formula,
        ops=MATRICES,
        bad=(
            ({"r": 0}, "r must be at least 1, got 0"),
            ({"vera_dropout": 1.0}, r"vera_dropout must be in \[0, 1\), got 1.0"),
            ({"bias": "some"}, "bias must be 'none', 'all' or 'vera_only', got 'some'"),
            ({"projection_prng_key": 0.5}, "projection_prng_key must be int, got 0.5"),
        ),
    ),
    "ia3": MethodCase(
        lambda **kw: IA3Config(**{"feedforward_modules": [], **kw}),
        ia3_formula,
        unmerges_exactly=True,
        bad=(
            ({"target_modules": ["q"], "feedforward_modules": ["q", "w"]}, r"must be among .* which lacks \['w'\]"),
            ({"feedforward_modules": "w("}, r"feedforward_modules='w\(' is not a valid regular expression"),
            ({"init_ia3_weights": "ones"}, "init_ia3_weights must be bool, got 'ones'"),
        ),
    ),
    "ia3_feedforward": MethodCase(
        lambda **kw: IA3Config(**{"feedforward_modules": ".*layer.*", **kw}),
        ia3_feedforward_formula,
        ops=tuple(op for op in MATRICES if op != "embedding"),
        unmerges_exactly=True,
    ),
    "ln_tuning": MethodCase(
        lambda **kw: LNTuningConfig(**kw),
        ln_tuning_formula,
        unmerges_exactly=True,
        combines=False,
    ),
    "oft": MethodCase(
        lambda **kw: OFTConfig(**{"oft_block_size": 3, **kw}),
        oft_formula(exact=False),
        ops=MATRICES,
        unmerges_exactly=True,
        bad=(
            ({"r": 2}, "give one of them and set the other to 0, got r=2 and oft_block_size=3"),
            ({"oft_block_size": 0}, "got r=0 and oft_block_size=0"),
            ({"r": -1, "oft_block_size": 0}, "r must be at least 0, got -1"),
            ({"module_dropout": 1.0}, r"module_dropout must be in \[0, 1\), got 1.0"),
            ({"bias": "some"}, "bias must be 'none', 'all' or 'oft_only', got 'some'"),
            ({"coft": True, "eps": 0.0}, "eps must be positive, got 0.0"),
            ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms must be at least 2 .* got 1"),
        ),
    ),
    "oft_cayley": MethodCase(
        lambda **kw: OFTConfig(**{"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, **kw}),
        oft_formula(exact=True),
        ops=MATRICES,
        unmerges_exactly=True,
    ),
    "boft": MethodCase(
        lambda **kw: BOFTConfig(**{"boft_block_size": 2, **kw}),
        boft_formula,
        ops=tuple(op for op in MATRICES if op != "embedding"),
        unmerges_exactly=True,
        bad=(
            ({"boft_block_num": 2}, "give one of them .* got boft_block_size=2 and boft_block_num=2"),
            ({"boft_block_size": 0}, "got boft_block_size=0 and boft_block_num=0"),
            ({"boft_block_size": -4}, "boft_block_size must be at least 0, got -4"),
            ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor must be at least 1, got 0"),
            ({"boft_dropout": -0.5}, r"boft_dropout must be in \[0, 1\), got -0.5"),
            ({"bias": "lora_only"}, "bias must be 'none', 'all' or 'boft_only', got 'lora_only'"),
        ),
    ),
    "boft_butterfly": MethodCase(
        lambda **kw: BOFTConfig(**{"boft_block_size": 2, "boft_n_butterfly_factor": 2, **kw}),
        boft_formula,
        ops=("conv1d", "conv2d", "conv3d"),  # whose features are a multiple of 4
        some_ops=True,
        unmerges_exactly=True,
    ),
    "bottleneck": MethodCase(
        lambda **kw: BottleneckConfig(**{"bottleneck_size": 3, "scaling": 0.5, **kw}),
        bottleneck_formula(parallel=False),
        merges=False,
        bad=(
            ({"bottleneck_size": 0}, "bottleneck_size must be at least 1, got 0"),
            ({"reduction_factor": -2.0}, "reduction_factor must be positive and finite, got -2.0"),
            ({"placement": "before"}, "placement must be 'sequential' or 'parallel', got 'before'"),
            ({"non_linearity": "linear"}, "non_linearity must be 'relu', .* or 'leaky_relu', got 'linear'"),
            ({"scaling": "free"}, "scaling must be float or 'learned', got 'free'"),
            ({"scaling": 0}, "got 0"),
            ({"placement": "parallel", "residual": False}, "residual must be True, got False"),
            ({"residual": False}, "set init_weights=False"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ),
    ),
    "bottleneck_parallel": MethodCase(
        lambda **kw: BottleneckConfig(**{"placement": "parallel", "scaling": "learned", **kw}),
        bottleneck_formula(parallel=True),
        ops=("linear", "linear_no_bias", "Conv1D", *NORMS),
        some_ops=True,
        merges=False,
    ),
    "trainable_tokens": MethodCase(
        lambda **kw: TrainableTokensConfig(**{"token_indices": [3, 0, 4], **kw}),
        trainable_tokens_formula,
        ops=("linear", "linear_no_bias", "Conv1D", "embedding"),
        unmerges_exactly=True,
        combines=False,
        bad=(
            ({"token_indices": [1, 1]}, r"ids of different tokens, none of them negative, got \[1, 1\]"),
            ({"token_indices": [-1]}, r"got \[-1\]"),
            ({"token_indices": ["a"]}, r"token_indices must be list\[int\], got \['a'\]"),
        ),
    ),
}  # fmt: skip
EVERY_BAD = (
    ({"target_modules": "lay(er"}, r"target_modules='lay\(er' is not a valid regular expression"),
    ({"exclude_modules": "lay(er"}, r"exclude_modules='lay\(er' is not a valid regular expression"),
    ({"target_modules": "layer", "layers_to_transform": [1]}, "layers_to_transform cannot be combined"),
    ({"target_modules": ["layer"], "layers_pattern": "h"}, "layers_pattern .* needs layers_to_transform"),
    ({"target_modules": ["layer"], "task_type": "CHESS"}, "task_type must be one of .* got 'CHESS'"),
)
