"""`peft.estimate_memory` and `peft memory`: against what torch allocates, and against arithmetic."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import make_tokenizer, save_llama
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, T5Config

from peft import (
    CompactLoraConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    SftAdamW,
    SftConfig,
    SftSelector,
    SsfConfig,
    estimate_memory,
    get_peft_model,
)
from peft.auto import AutoPeftModel
from peft.cli import main
from peft.config import PeftConfig
from peft.finetuna import FinetunaConfig
from peft.mapping import METHODS as PEFT_METHODS, config_class
from peft.utils.other import enable_checkpointing

ROWS, LENGTH = 4, 48
LLAMA = LlamaConfig(
    vocab_size=1000, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
MODELS = {
    "llama": ("CAUSAL_LM", LLAMA),
    "gpt2": ("CAUSAL_LM", GPT2Config(n_embd=96, n_layer=2, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)),
    "bert": (
        "SEQ_CLS",
        BertConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000),
    ),
    "t5": (
        "SEQ_2_SEQ_LM",
        T5Config(d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, vocab_size=1000, decoder_start_token_id=0),
    ),
}
METHODS = {
    "full": lambda: None,
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "sft": lambda: SftConfig(num_tunable_weights=3000, target_modules="all-linear"),
    "ssf": lambda: SsfConfig(target_modules="all-linear"),
    "oft": lambda: OFTConfig(target_modules="all-linear"),
    "compact": CompactLoraConfig,
    "finetuna": FinetunaConfig,
    "prompts": lambda: PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
}


def estimate(model="llama", method="full", **options):
    task, config = MODELS[model]
    sizes = {"batch_size": ROWS, "sequence_length": LENGTH, "task_type": task}
    return estimate_memory(config, METHODS[method](), **{**sizes, **options})


def train(model, method, *, dtype=None, gradient_checkpointing=False, padding=False, mixed_precision=False) -> None:
    """Two update steps, written as users write them."""
    task, config = MODELS[model]
    config = copy.deepcopy(config)
    config.use_cache = False
    net = AutoPeftModel.base_class(PeftConfig(task_type=task)).from_config(config, dtype=dtype or torch.float32)
    if gradient_checkpointing:
        enable_checkpointing(net, {"use_reentrant": False})
    if method != "full":
        net = get_peft_model(net, METHODS[method]())
    parameters = [parameter for parameter in net.train().parameters() if parameter.requires_grad]
    selector = None
    if method == "sft":
        optimizer = SftAdamW(parameters, momentum_dtype=torch.float32)
        selector = SftSelector(net, optimizer, METHODS[method](), 10**6, 1)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True)
    batch = {"input_ids": torch.randint(1000, (ROWS, LENGTH))}
    batch["labels"] = torch.zeros(ROWS, dtype=torch.int64) if task == "SEQ_CLS" else batch["input_ids"].clone()
    if padding:
        batch["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        batch["attention_mask"][0, -5:] = 0
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
            loss = net(**batch).loss
        loss.backward()
        optimizer.step()
        if selector is not None:
            selector.step()
        optimizer.zero_grad()


def peak_allocated(run) -> int:
    """Bytes that torch has allocated on the CPU at the peak of `run`, by its profiler."""
    gc.collect()  # what an earlier run left must not be freed, and so subtracted, while this one is watched
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        ("llama", "full", {}),
        ("llama", "full", {"gradient_checkpointing": True}),
        ("llama", "full", {"dtype": torch.bfloat16}),
        ("llama", "lora", {"mixed_precision": True}),
        ("llama", "lora", {"padding": True}),
        ("llama", "sft", {}),
        ("llama", "ssf", {"gradient_checkpointing": True}),
        ("bert", "full", {"padding": True}),
        ("bert", "ssf", {}),
        ("gpt2", "lora", {"gradient_checkpointing": True}),
        ("gpt2", "sft", {"padding": True}),
        ("t5", "lora", {"padding": True}),
        ("llama", "oft", {}),
        ("gpt2", "prompts", {"padding": True}),
    ],
)
def test_estimate_is_what_training_takes(model, method, options):
    expected = estimate(model, method, device="cpu", **options).gpu_total
    train(model, method, **options)  # what is made once and kept is not the run's
    assert expected == pytest.approx(peak_allocated(lambda: train(model, method, **options)), rel=0.05)


def test_eighteen_bytes_per_parameter_of_mixed_precision():
    """4 for the weight, 4 for its gradient, 8 for AdamW's moments, 2 for the copy in which autocast computes."""
    linear = LlamaConfig(vocab_size=8, hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    for config, optimizer, expected in ((linear, "adamw", 18), (linear, "sgd", 10), (linear, "adamw_8bit", 12)):
        found = estimate_memory(
            config, batch_size=1, sequence_length=1, mixed_precision=True, optimizer=optimizer,
            gradient_accumulation=True,
        )  # fmt: skip
        assert found.gpu_total / found.parameters == pytest.approx(expected, rel=0.02)


def test_optimizer_states():
    size = {name: estimate(optimizer=name).gpu["optimizer"] for name in ("adamw", "adamw_8bit", "sgd", "adafactor")}
    numel = AutoModelForCausalLM.from_config(LLAMA).num_parameters()
    assert size["adamw"] == pytest.approx(8 * numel, rel=1e-3)
    assert size["adamw_8bit"] == pytest.approx((2 + 8 / 256) * numel, rel=0.02)  # a float32 scale for 256 numbers
    assert size["sgd"] == 0 < size["adafactor"] < 0.2 * numel
    sft = {name: estimate(method="sft", optimizer=name).gpu["optimizer"] for name in (None, "sft_adamw")}
    assert sft[None] == sft["sft_adamw"] == pytest.approx((12 + 8) * 3000, rel=0.02)  # moments and age, two sums


@pytest.mark.parametrize(
    ("quantization", "bits"), [*((kind, 4 + 8 / 64 + 32 / (64 * 256)) for kind in ("nf4", "fp4")), ("int8", 8)]
)
def test_packed_weights_take_what_bitsandbytes_stores(quantization, bits):
    found = estimate(method="lora", quantization=quantization)
    base = AutoModelForCausalLM.from_config(LLAMA)
    packed = [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]
    numel = sum(layer.weight.numel() for layer in packed)
    rest = 4 * (base.num_parameters() - numel)
    scales = 4 * sum(layer.out_features for layer in packed) if quantization == "int8" else 0
    adapter, rotary = 4 * found.trained, 2 * 4 * LLAMA.head_dim // 2
    assert found.gpu["weights"] == pytest.approx(numel * bits / 8 + scales + rest + adapter + rotary, rel=1e-3)
    assert found.parameters == base.num_parameters() + found.trained
    bnb = pytest.importorskip("bitsandbytes")
    if quantization != "int8":
        layer = bnb.nn.Linear4bit(256, 192, bias=False, quant_type=quantization).to("cpu")
        state = layer.weight.quant_state
        stored = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        assert stored * 8 == pytest.approx(256 * 192 * bits, rel=1e-3)


def test_quantized_bases_of_every_method():
    whole = {method: estimate(method=method, dtype="bfloat16") for method in ("lora", "sft", "ssf")}
    for method, plain in whole.items():
        packed = estimate(method=method, quantization="nf4")
        assert packed.trained == plain.trained
        assert packed.gpu["weights"] < plain.gpu["weights"] and packed.gpu["activations"] > 0


def test_what_is_shared_out_over_gpus():
    one = estimate()
    parts = {name: estimate(num_gpus=4, sharding=name) for name in ("zero1", "zero2", "zero3", "fsdp")}
    for name, found in parts.items():
        assert found.gpu["optimizer"] == -(-one.gpu["optimizer"] // 4)
        assert found.gpu["activations"] == one.gpu["activations"]
        whole = name in ("zero1", "zero2")
        assert found.gpu["weights"] == (one.gpu["weights"] if whole else -(-one.gpu["weights"] // 4))
    assert parts["zero3"].gpu["communication"] == one.gpu["weights"]  # all of so small a model is gathered
    assert 0 < parts["fsdp"].gpu["communication"] < one.gpu["weights"]
    assert estimate(num_gpus=4).gpu["communication"] == 4 * one.trained  # DDP's buckets


def test_sixteen_bit_weights_and_wide_copies_of_deepspeed():
    """ZeRO, arXiv 1910.02054, section 3.1: 2 bytes for the weight, 12 for the optimiser's copy and moments."""
    found = estimate(num_gpus=2, sharding="zero1", mixed_precision=True)
    assert found.gpu["weights"] == pytest.approx(2 * found.parameters, rel=2e-3)
    assert found.gpu["optimizer"] == pytest.approx(12 * found.parameters / 2, rel=1e-3)
    fsdp = estimate(num_gpus=2, sharding="fsdp", mixed_precision=True)  # its float32 shards are the weights
    assert fsdp.gpu["weights"] == pytest.approx(4 * found.parameters / 2, rel=2e-3)
    assert fsdp.gpu["optimizer"] == pytest.approx(8 * found.parameters / 2, rel=1e-3)
    packed = {
        name: estimate(method="lora", quantization="nf4", **options)
        for name, options in {"one": {}, "fsdp": {"num_gpus": 2, "sharding": "fsdp", "mixed_precision": True}}.items()
    }
    assert packed["fsdp"].gpu["weights"] == pytest.approx(packed["one"].gpu["weights"] / 2, rel=1e-3)


def test_offloading_moves_to_the_cpu():
    one = estimate()
    moved = estimate(sharding="zero2", offload="optimizer")
    assert moved.gpu["optimizer"] == moved.gpu["gradients"] == 0
    assert moved.cpu["optimizer"] == one.gpu["optimizer"] and moved.cpu["gradients"] == 4 * one.trained
    assert moved.gpu["weights"] == one.gpu["weights"] and moved.cpu["weights"] == 0
    everything = estimate(sharding="fsdp", offload="all")
    assert everything.gpu["weights"] == 0 and everything.cpu["weights"] == one.gpu["weights"]
    assert everything.gpu_total < moved.gpu_total and everything.cpu_total > moved.cpu_total


def test_gpus_keep_less_of_dropout():
    assert estimate("bert", device="cuda").gpu["activations"] < 0.8 * estimate("bert", device="cpu").gpu["activations"]
    assert estimate("llama", device="cuda") == estimate("llama", device="cpu")  # no dropout


def test_accumulated_gradients_are_there_during_forward():
    first, later = estimate(), estimate(gradient_accumulation=True)
    assert later.gpu_total >= first.gpu_total + 4 * first.trained - first.gpu["gradients"]


def test_nothing_is_left_behind():
    """Functions that are exchanged for the time of the estimate are themselves again, after an error too."""
    from transformers.utils import import_utils

    watched = lambda: (torch.nn.functional.dropout, torch.nn.functional.scaled_dot_product_attention)  # noqa: E731
    before, reader, adapter = watched(), import_utils.is_fake_tensor, METHODS["lora"]()
    task, config = MODELS["bert"]
    given = config.to_dict(), adapter.to_dict()
    estimate_memory(config, adapter, task_type=task, batch_size=1, sequence_length=8)
    with pytest.raises(ValueError, match="active SFT adapter"):
        estimate(optimizer="sft_sm3")
    assert watched() == before and import_utils.is_fake_tensor is reader
    assert (config.to_dict(), adapter.to_dict()) == given
    assert torch.zeros(1).is_cpu and type(torch.zeros(1)) is torch.Tensor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"sequence_length": 1.5}, "sequence_length must be a whole number"),
        ({"num_gpus": -1}, "num_gpus must be"),
        ({"optimizer": "lion"}, "optimizer must be None or one of adamw, .*, got 'lion'"),
        ({"quantization": "int3", "method": "lora"}, "quantization must be None or one of nf4, fp4, int8, got 'int3'"),
        ({"quantization": "nf4"}, "it needs a peft_config"),
        ({"sharding": "zero4"}, "sharding must be None or one of"),
        ({"offload": "all"}, "choose one by sharding"),
        ({"offload": "all", "sharding": "zero2"}, "which sharding='zero2' cannot do"),
        ({"offload": "optimizer", "sharding": "fsdp"}, "use offload='all'"),
        ({"device": "tpu"}, "device must be 'cuda' or 'cpu', got 'tpu'"),
        ({"dtype": "int8"}, "dtype must be a floating-point type"),
        ({"dtype": "bfloat16", "mixed_precision": True}, "mixed_precision trains float32 weights"),
        ({"task_type": "POETRY"}, "POETRY"),
        ({"method": "sft", "optimizer": "adamw"}, "needs the optimizer SftAdamW, got AdamW"),
        ({"method": "sft", "sharding": "zero3"}, "partitions the trained values"),
        ({"method": "compact"}, "a structure is searched for with the model's weights, .*: give best_structure"),
        ({"method": "finetuna"}, "the nearest is LoRA with quantization='int8'"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(**options)


def test_models_that_are_refused():
    with pytest.raises(TypeError, match="got Linear"):
        estimate_memory(torch.nn.Linear(2, 2))
    packed = copy.deepcopy(LLAMA)
    packed.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="that of packed weights"):
        estimate_memory(packed)


# ---- The command ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("tiny"), make_tokenizer())


@pytest.fixture(autouse=True)
def loud_transformers():
    """The command silences transformers' logging, for the whole process."""
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()


def run(*argv) -> int:
    """As the shell does; returns the exit code."""
    try:
        return main(["memory", *map(str, argv)])
    except SystemExit as stop:
        return stop.code


def test_command_prints_the_estimate(tiny, capsys):
    options = (
        "--method lora --rank 4 --batch 2 --seq 16 --quantize nf4 --optimizer adamw_8bit --checkpointing --padding"
    )
    assert run(tiny, *options.split()) == 0
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    expected = estimate_memory(
        tiny, config, batch_size=2, sequence_length=16, quantization="nf4", optimizer="adamw_8bit",
        gradient_checkpointing=True, padding=True,
    )  # fmt: skip
    assert capsys.readouterr().out == f"{expected}\n"
    assert f"{expected.trained:,} of {expected.parameters:,}" in str(expected)


ARGUMENTS = {
    "adalora": {"total_step": 100},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 1},
    "compact_lora": {"best_structure": {"num_hidden_layers": [1, 0], "r": [4, 0], "alpha": [8, 0]}},
    "cpt": {"cpt_token_ids": [1, 2]},
    "trainable_tokens": {"token_indices": [1]},
    **{f"{name}_tuning": {"num_virtual_tokens": 4} for name in ("p", "prefix", "prompt", "multitask_prompt")},
}


@pytest.mark.parametrize("method", sorted(set(map(str.lower, PEFT_METHODS)) - {"sft", "lora", "ssf", "finetuna"}))
def test_command_takes_every_method(method, tiny, capsys):
    arguments = ARGUMENTS.get(method, {})
    assert run(tiny, "--method", method, "--adapter-args", json.dumps(arguments), "--batch", 2, "--seq", 8) == 0
    config = config_class(method.upper())(task_type="CAUSAL_LM", **arguments)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).get_nb_trainable_parameters()[0]
    assert f"\n{trained:,} of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "full", "--rank", "4"], "--rank belongs to --method lora"),
        (["--method", "full", "--target-modules", "q_proj"], "--target-modules is for adapters"),
        (["--batch", "0"], "argument --batch/--batch-size: must be a whole number"),
        (["--quantize", "int3"], "quantization must be None or one of nf4, fp4, int8"),
        (["--method", "full", "--quantize", "nf4"], "it needs a peft_config"),
        (["--offload", "all"], "choose one by sharding"),
        (["--method", "lora", "--target-modules", "nothing"], "nothing"),
        (["--task", "POETRY"], "POETRY"),
        (["--method", "chess"], "--method chess: peft_type='CHESS' is no method of peft"),
        (["--method", "prompt_tuning"], "PromptTuningConfig needs num_virtual_tokens"),
        (["--method", "ia3", "--adapter-args", "[]"], "must be a JSON object"),
        (["--method", "ia3", "--adapter-args", '{"r": 4}'], "unexpected keyword argument 'r'"),
        (["--method", "ia3", "--rank", "4"], "--rank belongs to --method lora"),
        (["--method", "lora", "--adapter-args", '{"r": 4}'], "--adapter-args is for other methods than lora"),
    ],
)
def test_command_refuses_in_one_line(options, message, tiny, capsys):
    assert run(tiny, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_command_needs_a_model(tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "cannot read the configuration of" in capsys.readouterr().err


def test_the_package_does_not_import_it():
    code = "import peft, sys; peft.LoraConfig; sys.exit('peft.memory' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
