"""`peft.estimate_memory` against what training takes: a table of runs on the CPU, each in a process of its own.

Measured is the peak of torch's allocations on the CPU, from before the model is made to the end of the second update
step, as torch's profiler counts them: it is exact and repeats. Beside it stands by how much the process grew
(*resident*), which the estimate does not claim to know: holes in the heap, and what kernels allocate themselves.

The weights are random: memory does not depend on their numbers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from train_step import peak_allocated, resident
from transformers import BertConfig, BloomConfig, GPT2Config, LlamaConfig, MT5Config, PretrainedConfig, T5Config

import peft
from peft import LoraConfig, SftConfig, SsfConfig
from peft.utils.other import enable_checkpointing

MODELS: dict[str, tuple[str, PretrainedConfig]] = {
    "SmolLM2-135M": (
        "CAUSAL_LM",
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        ),
    ),
    "MiniLM-L6": (
        "SEQ_CLS",
        BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
    ),
    "GPT-2": ("CAUSAL_LM", GPT2Config()),
    "T5-small": ("SEQ_2_SEQ_LM", T5Config(vocab_size=32128, decoder_start_token_id=0)),
}  # fmt: skip
METHODS = {
    "full": None,
    "LoRA": LoraConfig(r=8, target_modules="all-linear"),
    "SFT": SftConfig(num_tunable_weights=2_000_000, target_modules="all-linear"),
    "SFT, sm3": SftConfig(num_tunable_weights=2_000_000, target_modules="all-linear", selection_algorithm="sm3"),
    "SSF": SsfConfig(target_modules="all-linear"),
}
# model, method, sequences, tokens, further arguments of `estimate_memory`
CASES: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("SmolLM2-135M", "full", 4, 128, {}),
    ("SmolLM2-135M", "full", 8, 256, {"gradient_checkpointing": True}),
    ("SmolLM2-135M", "full", 2, 128, {"mixed_precision": True}),
    ("SmolLM2-135M", "LoRA", 4, 128, {}),
    ("SmolLM2-135M", "LoRA", 4, 512, {"gradient_checkpointing": True}),
    ("SmolLM2-135M", "LoRA", 4, 128, {"dtype": "bfloat16"}),
    ("SmolLM2-135M", "LoRA", 4, 128, {"quantization": "nf4"}),
    ("SmolLM2-135M", "SFT", 4, 128, {}),
    ("SmolLM2-135M", "SFT", 4, 256, {"gradient_checkpointing": True}),
    ("SmolLM2-135M", "SSF", 4, 128, {}),
    ("MiniLM-L6", "full", 16, 128, {"padding": True}),
    ("MiniLM-L6", "LoRA", 32, 128, {"padding": True}),
    ("MiniLM-L6", "SFT, sm3", 32, 128, {"padding": True}),
    ("GPT-2", "full", 2, 128, {"optimizer": "sgd", "gradient_accumulation": True}),
    ("GPT-2", "full", 2, 128, {"optimizer": "adafactor"}),
    ("GPT-2", "SSF", 4, 256, {"gradient_checkpointing": True}),
    ("T5-small", "LoRA", 8, 128, {"padding": True}),
]

# The models of a table that people quote, in float32 on one GPU of 80 GB, and its figures in GB: full fine-tuning,
# LoRA, LoRA with DeepSpeed's off-loading (GPU and CPU). None: out of memory.
T5_XL = {"feed_forward_proj": "gated-gelu", "num_layers": 24, "d_kv": 64, "decoder_start_token_id": 0}
QUOTED: dict[str, tuple[str, PretrainedConfig, tuple[float | None, ...]]] = {
    "bigscience/T0_3B": (
        "SEQ_2_SEQ_LM",
        T5Config(vocab_size=32128, d_model=2048, d_ff=5120, num_heads=32, **T5_XL),
        (47.14, 14.4, 9.8, 17.8),
    ),
    "bigscience/mT0-xxl": (
        "SEQ_2_SEQ_LM",
        MT5Config(vocab_size=250112, d_model=4096, d_ff=10240, num_heads=64, **T5_XL),
        (None, 56, 22, 52),
    ),
    "bigscience/bloomz-7b1": (
        "CAUSAL_LM",
        BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32),
        (None, 32, 18.1, 35),
    ),
}


def quoted(rows: int = 8, length: int = 64) -> str:
    """Estimates for the models of QUOTED beside its figures."""
    lines = ["| model | | quoted, GB | estimated, GiB |", "|---|---|---:|---:|"]
    for name, (task, config, (full, lora, gpu, cpu)) in QUOTED.items():
        adapter = LoraConfig(r=8, task_type=task)
        sizes = {"batch_size": rows, "sequence_length": length, "task_type": task, "padding": True}
        for label, said, method, options in (
            ("full fine-tuning", full, None, {}),
            ("LoRA", lora, adapter, {}),
            ("LoRA, off-loaded: GPU / CPU", (gpu, cpu), adapter, {"sharding": "zero3", "offload": "all"}),
        ):
            found = peft.estimate_memory(config, method, **sizes, **options)
            shown = f"{found.gpu_total / 2**30:.1f}"
            if isinstance(said, tuple):
                said, shown = f"{said[0]} / {said[1]}", f"{shown} / {found.cpu_total / 2**30:.1f}"
            lines.append(f"| {name} | {label} | {said or 'out of memory'} | {shown} |")
    return "\n".join(lines)


def train(case: tuple[str, str, int, int, dict[str, Any]]) -> None:
    """Two update steps, as a user's script would take them."""
    name, method, rows, length, options = case
    task, config = MODELS[name]
    model = build(task, copy.deepcopy(config), options)
    adapter = METHODS[method]
    if adapter is not None:
        adapter.task_type = task
        model = peft.get_peft_model(model, adapter)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, parameters, method, options.get("optimizer"))
    selector = None
    if method == "SFT":
        selector = peft.SftSelector(model, optimizer, adapter, total_update_steps=10**6, grad_accumulation_steps=1)
    batch = {"input_ids": torch.randint(config.vocab_size, (rows, length))}
    batch["labels"] = torch.zeros(rows, dtype=torch.int64) if task == "SEQ_CLS" else batch["input_ids"].clone()
    if options.get("padding"):
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
        batch["attention_mask"][0, -1] = 0
    for _ in range(2):
        for _ in range(1 + options.get("gradient_accumulation", False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=options.get("mixed_precision", False)):
                loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        if selector is not None:
            selector.step()
        optimizer.zero_grad()


def build(task: str, config: PretrainedConfig, options: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    kinds = {
        "CAUSAL_LM": AutoModelForCausalLM,
        "SEQ_CLS": AutoModelForSequenceClassification,
        "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    }
    config.use_cache = False
    quantized = options.get("quantization")
    dtype = torch.bfloat16 if quantized else getattr(torch, options.get("dtype", "float32"))
    model = kinds[task].from_config(config, dtype=dtype)
    if quantized:
        quantize(model)
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if options.get("gradient_checkpointing"):
        enable_checkpointing(model, {"use_reentrant": False})
    return model


def quantize(model: torch.nn.Module) -> None:
    """Pack the linear layers but the head, as bitsandbytes does in 4 bits with double quantisation."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings():
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4"
            )
            packed.load_state_dict(layer.state_dict())
            model.set_submodule(name, packed.to("cpu"))


def make_optimizer(model, parameters, method: str, name: str | None) -> torch.optim.Optimizer:
    if method == "SFT":
        return peft.SftAdamW(parameters, momentum_dtype=torch.float32)
    if method == "SFT, sm3":
        from peft.tuners.sft.selector import named_deltas

        return peft.SftSM3(parameters, {delta.values: delta for delta in named_deltas(model).values()})
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3)
    if name == "adafactor":
        from transformers import Adafactor

        return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(parameters, fused=True)


def run(case: tuple[str, str, int, int, dict[str, Any]]) -> dict[str, int]:
    """One case: the estimate, and what the run takes, in bytes."""
    name, method, rows, length, options = case
    task, config = MODELS[name]
    estimate = peft.estimate_memory(
        config, METHODS[method], batch_size=rows, sequence_length=length, task_type=task, device="cpu", **options
    )
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    train(case)
    grown = resident("VmHWM") - before
    gc.collect()  # what the first run left must not be freed, and so subtracted, in the second
    return {"estimated": estimate.gpu_total, "measured": peak_allocated(lambda: train(case)), "resident": grown}


def table(results: list[tuple[tuple, dict[str, int]]]) -> str:
    lines = ["| model | method | batch | | estimated, MiB | allocated, MiB | error | resident, MiB |"]
    lines.append("|---|---|---:|---|---:|---:|---:|---:|")
    for (name, method, rows, length, options), result in results:
        about = ", ".join(key.replace("_", " ") if value is True else str(value) for key, value in options.items())
        sizes = [result[key] / 2**20 for key in ("estimated", "measured", "resident")]
        error = sizes[0] / sizes[1] - 1
        lines.append(
            f"| {name} | {method} | {rows} × {length} | {about} | {sizes[0]:,.0f} | {sizes[1]:,.0f} | {error:+.1%} | "
            f"{sizes[2]:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="run this one only, in this process, and print JSON")
    parser.add_argument("--quoted", action="store_true", help="print estimates beside figures that people quote")
    args = parser.parse_args()
    if args.quoted:
        print(quoted())
        return
    if args.case is not None:
        print(json.dumps(run(CASES[args.case])))
        return
    results = []
    for number, case in enumerate(CASES):
        print(f"{number + 1} of {len(CASES)}: {case}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, __file__, "--case", str(number)], capture_output=True, text=True, env={**os.environ}
        )
        if done.returncode:
            raise SystemExit(f"case {number} failed:\n{done.stderr}")
        results.append((case, json.loads(done.stdout.splitlines()[-1])))
    print(table(results))


if __name__ == "__main__":
    main()
