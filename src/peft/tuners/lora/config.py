"""Configuration of LoRA, in the key set of upstream's `adapter_config.json`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from ..._lazy import explain_missing
from ...config import documented
from ...utils.peft_types import PeftType
from ..common_config import TargetedConfig, check_probability, check_rank_and_alpha, check_tokens

INIT_NAMES = ("gaussian", "orthogonal", "loftq", "pissa", "pissa_niter_<number>", "olora")
# Initialisations of upstream's that are not in this version. An adapter's file brings its tensors, whatever they were
# initialised with; but some of the methods take the initial delta out of the base weights, and the file is for those.
INITS_NOT_YET = ("eva", "mica")
INITS_NOT_YET_THAT_CHANGE_THE_BASE = ("corda", "lora_ga")
INIT_FIELDS = ("eva_config", "corda_config", "lora_ga_config")  # how to initialise, and nothing else
# Switches of upstream's whose method is not in this version: field -> what it would be.
NOT_YET = {
    "megatron_config": "Megatron parallel layers",
    "eva_config": "EVA initialisation",
    "corda_config": "CorDA initialisation",
    "lora_ga_config": "LoRA-GA initialisation",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
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
class LoraRuntimeConfig:
    """How to run, as against what to compute; never saved."""

    ephemeral_gpu_offload: bool = False
    """When an adapter starts from weights that lie in main memory (DoRA, PiSSA, ...), work on the accelerator."""


@documented
@dataclass
class LoraConfig(TargetedConfig):
    """LoRA: a delta `scaling * B A` of rank `r` beside every target (arXiv 2106.09685, eq. 3).

    Raises:
        TypeError, ValueError: a value of another type or outside its range; it is named with the rule.
        NotImplementedError: a switch whose method is not in this version.
    """

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
    "olora" (arXiv 2406.01775): A and B are a main part of the base weights, which lose it. False: both random, so that
    the delta is not zero (for tests).
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
    eva_config: dict | None = None
    """Not in this version."""
    corda_config: dict | None = None
    """Not in this version."""
    lora_ga_config: dict | None = None
    """Not in this version."""
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
    """Not in this version."""
    runtime_config: LoraRuntimeConfig | dict = field(default_factory=LoraRuntimeConfig)
    """How to run; not saved."""
    lora_bias: bool = False
    """Give B a bias of its own; it goes into the layer's bias on merging."""
    target_parameters: list[str] | None = None
    """Not in this version."""
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
        self.peft_type = PeftType.LORA
        self._check_loftq()
        self._check_numbers()
        tokens = self.trainable_token_indices or {}
        for name, ids in (tokens if isinstance(tokens, dict) else {"input embeddings": tokens}).items():
            check_tokens(f"trainable_token_indices ({name})", ids)
        for name, what in NOT_YET.items():
            if getattr(self, name) and not (self.inference_mode and name in INIT_FIELDS):
                raise NotImplementedError(f"{name}={getattr(self, name)!r}: {what} is not in this version of peft")
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        if self.use_dora and self.lora_bias:
            raise ValueError("lora_bias=True has no place in DoRA, which rescales the weight: leave one of them out")

    def _check_numbers(self):
        check_rank_and_alpha(self, "lora_alpha")
        check_probability(self, "lora_dropout")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        self._check_init()

    def _check_init(self):
        init = self.init_lora_weights
        if isinstance(init, bool) or init in INIT_NAMES or re.fullmatch(r"pissa_niter_\d+", str(init)):
            return
        if init not in INITS_NOT_YET and init not in INITS_NOT_YET_THAT_CHANGE_THE_BASE:
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

    @property
    def init_changes_base(self) -> bool:
        """Whether the adapter's tensors fit only base weights that its initialisation has changed."""
        init = str(self.init_lora_weights)
        return init in ("olora", *INITS_NOT_YET_THAT_CHANGE_THE_BASE) or init.startswith("pissa")

    def to_dict(self):
        content = super().to_dict()
        del content["runtime_config"]
        return content


explain_missing(__name__)
