"""Configuration of LoRA, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from ..._lazy import explain_missing
from ...config import check_least, check_types, documented_dataclass
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig, check_probability, check_rank_and_alpha, check_tokens

INIT_NAMES = (
    "gaussian", "orthogonal", "eva", "loftq", "pissa", "pissa_niter_<number>", "olora", "corda", "lora_ga",
)  # fmt: skip
PREPARED_INITS = ("corda", "lora_ga")  # whose factors are computed from data before there is an adapter
# Initialisations of upstream's that are not in this version. An adapter's file brings its tensors, whatever they were
# initialised with.
INITS_NOT_YET = ("mica",)
# Switches of upstream's whose method is not in this version: field -> what it would be.
NOT_YET = {
    "megatron_config": "Megatron parallel layers",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "ensure_weight_tying": "tied adapters",
}


@dataclass
class LoftQConfig:
    """How LoftQ (arXiv 2310.08659) quantises.

    Raises:
        ValueError: a value outside its range; it is named with the rule.
    """

    loftq_bits: int = 4
    """Bits of a quantised weight: 2, 4 (NF4) or 8."""
    loftq_iter: int = 1
    """Turns of quantising and approximating. Adapters of several turns fit only the base weights that they were made
    with, and not the same model packed by bitsandbytes."""

    def __post_init__(self):
        if self.loftq_bits not in (2, 4, 8):
            raise ValueError(f"loftq_bits must be 2, 4 or 8, got {self.loftq_bits!r}")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise ValueError(f"loftq_iter must be a whole number of at least 1, got {self.loftq_iter!r}")


@dataclass
class EvaConfig:
    """How EVA (arXiv 2410.07170) takes A and the ranks of the layers from their inputs.

    Raises:
        TypeError, ValueError: a value of another type or outside its range; it is named with the rule.
    """

    rho: float = 2.0
    """A layer gets at most rho times its rank in the configuration, at the cost of others; 1: all keep theirs."""
    tau: float = 0.99
    """A layer's components are final when the cosines between those of two batches in a row are as large as this."""
    use_label_mask: bool = True
    """Leave out tokens that bear no loss (of batches with labels)."""
    label_mask_value: int = -100
    """The label of those."""
    whiten: bool = False
    """Divide the rows of A by the roots of their singular values."""
    adjust_scaling_factors: bool = True
    """Let lora_alpha follow the rank of a layer, so that the scaling stays."""

    def __post_init__(self):
        check_types(self)
        check_least(self, rho=1)
        check_probability(self, "tau")


@dataclass
class CordaConfig:
    """How CorDA (arXiv 2406.05223) decomposes weights by what goes through them.

    Raises:
        TypeError, ValueError: a value of another type or outside its range; it is named with the rule.
    """

    cache_file: str | None = None
    """Where the decompositions are written, or, if the file is there, read from."""
    covariance_file: str | None = None
    """The same for the covariances of the inputs."""
    corda_method: Literal["ipm", "kpm"] = "ipm"
    """"ipm": adapt what matters most to the data, to learn it faster. "kpm": what matters least to them, so that what
    the model knows of them stays."""
    verbose: bool = False
    """Show the progress."""
    use_float16_for_covariance: bool = False
    """Collect the covariances in float16, which takes half the memory."""
    prune_temporary_fields: bool = True
    """Remove what was prepared from the modules when the adapter has taken it over."""

    def __post_init__(self):
        check_types(self)


@dataclass
class LoraGAConfig:
    """How LoRA-GA (arXiv 2407.05000) makes factors of the gradient of a weight, `G = U S V^T`.

    Raises:
        TypeError, ValueError: a value of another type or outside its range; it is named with the rule.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which of the first 2 r singular vectors A (of V) and B (of U) get: "ArB2r": A the first r, B the others (theorem
    3.1). "A2rBr": the other way round. "ArBr": every second one each. "random": r each, drawn at random."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """Lengths of A's rows and B's columns. "stable": O^(1/4) / sqrt(stable_gamma), for O output channels (theorem 3.2).
    "weight_svd": those of B are the largest singular value of the weight. "gd_scale": 1 / scaling. "unit": 1."""
    stable_gamma: int = 16
    """For scale="stable"."""

    def __post_init__(self):
        check_types(self)
        check_least(self, stable_gamma=1)


INIT_CONFIGS: dict[str, tuple[str, type]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
"""Initialisation -> the field with its settings, and their class."""


@dataclass
class LoraRuntimeConfig:
    """How to run, as against what to compute; never saved."""

    ephemeral_gpu_offload: bool = False
    """When an adapter starts from weights that lie in main memory (DoRA, PiSSA, ...), work on the accelerator."""


@documented_dataclass
class LoraConfig(TargetedConfig):
    """LoRA: a delta `scaling * B A` of rank `r` beside every target (arXiv 2106.09685, eq. 3).

    Raises:
        NotImplementedError: a switch whose method is not in this version.
    """

    method = PeftType.LORA
    r: int = 8
    """Rank of the delta."""
    lora_alpha: float = 8
    """The delta is scaled by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of the delta, in training."""
    fan_in_fan_out: bool = False
    """Kept for files of other tools: whether a weight is stored transposed is read from the layer."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model train: none, all, or those of adapted layers."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rank-stabilised LoRA, arXiv 2312.03732, eq. 4)."""
    init_lora_weights: bool | str = True
    """True: A Kaiming-uniform, B zero. "gaussian": A normal with deviation 1/r, B zero. "orthogonal": A and B with
    orthogonal factors whose product is zero. "loftq": the base weights are quantised, and A and B make up for the error
    (arXiv 2310.08659). "pissa" (arXiv 2404.02948), "pissa_niter_<number>" (the same, with a fast decomposition) and
    "olora" (arXiv 2406.01775): A and B are a main part of the base weights, which lose it. "eva": A from the layers'
    inputs, see `initialize_lora_eva_weights`. "corda", "lora_ga": A and B from data too, see `preprocess_corda`,
    `preprocess_loraga`. False: both random, so that the delta is not zero (for tests).
    Files of adapters that were initialised in another way are read; see the compatibility page."""
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    """Ranks of single layers: {regular expression for the end of a module's name: rank}."""
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    """lora_alpha of single layers, like rank_pattern."""
    megatron_config: dict | None = None
    """Not in this version."""
    megatron_core: str | None = "megatron.core"
    """Import path of Megatron; without effect while megatron_config is None."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings are trained and saved beside the adapter: ids of the input embeddings', or {end of a
    module's name: ids}. What is tied to a module is trained along."""
    loftq_config: LoftQConfig | dict | None = field(default_factory=dict)
    """Bits and turns of init_lora_weights="loftq": a LoftQConfig, or its fields as a dict."""
    eva_config: EvaConfig | dict | None = None
    """Settings of init_lora_weights="eva": an EvaConfig, or its fields as a dict."""
    corda_config: CordaConfig | dict | None = None
    """Settings of init_lora_weights="corda": a CordaConfig, or its fields as a dict."""
    lora_ga_config: LoraGAConfig | dict | None = None
    """Settings of init_lora_weights="lora_ga": a LoraGAConfig, or its fields as a dict."""
    use_dora: bool = False
    """Train the weight's magnitude, one number per output channel, apart from its direction, to which LoRA is applied
    (arXiv 2402.09353)."""
    velora_config: dict | None = None
    """Not in this version."""
    alora_invocation_tokens: list[int] | None = None
    """Not in this version."""
    use_qalora: bool = False
    """Not in this version."""
    qalora_group_size: int = 16
    """Group size of QA-LoRA; without effect while use_qalora is False."""
    monteclora_config: dict | None = None
    """Not in this version."""
    layer_replication: list[tuple[int, int]] | None = None
    """Layers of a deeper model, as ranges (first, last + 1) of the model's: [(0, 3), (1, 4)] is 0, 1, 2, 1, 2, 3. Those
    that come again share their weights, and have adapters of their own."""
    runtime_config: LoraRuntimeConfig | dict = field(default_factory=LoraRuntimeConfig)
    """How to run; not saved."""
    lora_bias: bool = False
    """Give B a bias of its own; it goes into the layer's bias on merging."""
    target_parameters: list[str] | None = None
    """Bare parameters to adapt, such as the fused experts of a layer: ends of their names ("experts.down_proj")."""
    use_bdlora: dict | None = None
    """Not in this version."""
    arrow_config: dict | None = None
    """Not in this version."""
    kasa_config: dict | None = None
    """Not in this version."""
    ensure_weight_tying: bool = False
    """Not in this version."""

    def __post_init__(self):
        super().__post_init__()
        self._check_loftq()
        self._check_init_configs()
        self._check_parameters()
        for one in self.layer_replication or ():
            if len(one) != 2 or not 0 <= one[0] < one[1]:
                raise ValueError(f"layer_replication must be pairs (first, last + 1) of layers, got {tuple(one)}")
        self._check_numbers()
        tokens = self.trainable_token_indices or {}
        for name, ids in (tokens if isinstance(tokens, dict) else {"input embeddings": tokens}).items():
            check_tokens(f"trainable_token_indices ({name})", ids)
        for name, what in NOT_YET.items():
            if getattr(self, name):
                raise NotImplementedError(f"{name}={getattr(self, name)!r}: {what} is not in this version of peft")
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        if self.use_dora and self.lora_bias:
            raise ValueError("lora_bias=True has no place in DoRA, which rescales the weight: leave one of them out")

    def _check_numbers(self):
        check_rank_and_alpha(self, "lora_alpha")
        check_probability(self, "lora_dropout")
        self._check_init()

    def _check_init(self):
        init = self.init_lora_weights
        if isinstance(init, bool) or init in INIT_NAMES or re.fullmatch(r"pissa_niter_\d+", str(init)):
            return
        if init not in INITS_NOT_YET:
            raise ValueError(f"init_lora_weights must be True, False or one of {INIT_NAMES}, got {init!r}")
        if not self.inference_mode:
            raise NotImplementedError(
                f"init_lora_weights={init!r} is not in this version of peft, which has True, False and {INIT_NAMES}. "
                "(A saved adapter that was initialised so can be loaded: its file says inference_mode=true)"
            )

    def _check_loftq(self):
        """Fill in the defaults; a dict, as in upstream's files.

        Files that were initialised so and then declared to be plain (init_lora_weights: true) keep the settings.
        """
        given = self.loftq_config or {}
        given = given if isinstance(given, dict) else asdict(given)
        unknown = sorted(set(given) - {entry.name for entry in fields(LoftQConfig)})
        if unknown:
            raise ValueError(f"loftq_config has loftq_bits and loftq_iter, got {unknown}")
        if given and self.init_lora_weights != "loftq" and not self.inference_mode:
            raise ValueError(f"loftq_config={given} has no effect unless init_lora_weights is 'loftq'")
        self.loftq_config = asdict(LoftQConfig(**given)) if self.init_lora_weights == "loftq" else given

    def _check_parameters(self):
        if not self.target_parameters:
            return
        for name in ("lora_dropout", "use_dora", "lora_bias"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with target_parameters, whose owners run whole"
                )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is for linear layers: with target_parameters it must be "
                "True, False or 'gaussian'"
            )

    def _check_init_configs(self):
        """Fill in the settings of the initialisation; files may have those of another one, see `_check_loftq`."""
        for init, (name, settings) in INIT_CONFIGS.items():
            given = getattr(self, name)
            if given and self.init_lora_weights != init and not self.inference_mode:
                raise ValueError(f"{name}={given} has no effect unless init_lora_weights is {init!r}")
            if self.init_lora_weights == init and not isinstance(given, settings):
                known = {entry.name for entry in fields(settings)}
                if unknown := sorted(set(given or {}) - known):
                    raise ValueError(f"{name} has {sorted(known)}, got {unknown}")
                setattr(self, name, settings(**(given or {})))

    @property
    def init_changes_base(self) -> bool:
        """Whether the adapter's tensors fit only base weights that its initialisation has changed."""
        init = str(self.init_lora_weights)
        return init in ("olora", *PREPARED_INITS) or init.startswith("pissa")

    def to_dict(self):
        content = super().to_dict()
        del content["runtime_config"]
        for name, settings in INIT_CONFIGS.values():
            if isinstance(content[name], settings):
                content[name] = asdict(content[name])
        return content


explain_missing(__name__)
