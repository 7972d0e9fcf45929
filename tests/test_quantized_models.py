"""Packed language models from transformers, and LoftQ."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
import transformers
from quantized_bases import BASES, REWRITABLE, four_bit
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, gpt2, llama, logits, losses_of_training, make_tokenizer, methods, save_llama, tokens
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from peft import (
    LoftQConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
)
from peft.cli import main
from peft.utils.loftq_utils import closest_factors, loftq_init, normal_float_codes, round_to_normal_float

QV = ["q_proj", "v_proj"]


def by_transformers(name: str):
    """transformers' quantisation configurations, for the libraries that it runs on the CPU."""
    if name == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if name == "torchao":
        return transformers.TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("llama")
    base = llama(hidden_size=64, intermediate_size=128, attention_bias=True, mlp_bias=True)  # for SSF's shifts
    base.to(torch.bfloat16).save_pretrained(path)
    return str(path)


@methods
@pytest.mark.parametrize("name", ["nf4", "int8", "torchao", "quanto"])
def test_from_loading_to_a_plain_model_on_disk(name, method, folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=by_transformers(name), dtype=torch.bfloat16)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, CONFIGS[method]()).train()
    ids = tokens()
    losses = losses_of_training(model, ids, steps=15, lr=1e-2)
    assert losses[-1] < losses[0]
    expected = logits(model, ids).float()
    merged = model.merge_and_unload(dequantize=torch.float32)
    packed = [m for m in merged.modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear]
    assert not packed and {p.dtype for p in merged.parameters()} == {torch.float32}
    assert_close(logits(merged, ids), expected, rtol=0.05, atol=0.05)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again, ids), logits(merged, ids))


@pytest.mark.parametrize("base", REWRITABLE)
def test_prepare_model_widens_what_packed_layers_can_take(base):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64, dtype=torch.bfloat16)
            self.layer = BASES[base].pack(nn.Linear(64, 64, dtype=torch.bfloat16))

        def forward(self, x):
            return self.layer(self.norm(x.to(self.norm.weight.dtype)))

    model = Normed()
    before = {key: t.dtype for key, t in model.layer.state_dict().items() if torch.is_tensor(t)}
    assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) is model
    casts = BASES[base].name in ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8", "block-wise 8-bit")
    assert model.norm.weight.dtype == (torch.float32 if casts else torch.bfloat16)
    assert {key: t.dtype for key, t in model.layer.state_dict().items() if torch.is_tensor(t)} == before
    assert not any(p.requires_grad for p in model.parameters())
    model = get_peft_model(model, LoraConfig(target_modules=["layer"], init_lora_weights=False))
    model(torch.randn(3, 64)).float().square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


# LoftQ


def test_the_values_of_four_bits_are_those_of_nf4():
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu")
    codes = normal_float_codes(4).float()
    assert_close(codes, theirs, rtol=0, atol=1e-6)
    # Nothing is near the middle of two values (0.08 apart), where the last bit decides which of them is the nearest.
    W = (codes[torch.randint(16, (33, 64))] + 0.06 * (torch.rand(33, 64) - 0.5)).clamp(-1, 1)
    W[:, 0] = 1
    W = (W * torch.rand(33, 1)).flatten()[:2100].view(30, 70)
    packed, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert_close(round_to_normal_float(W, 4), functional.dequantize_4bit(packed, state), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_takes_the_nearest_value(bits):
    W = torch.randn(5, 64, dtype=torch.float64)
    W[3] = 0
    codes = normal_float_codes(bits)
    assert len(codes) == 2**bits and codes[0] == -1 and codes[-1] == 1 and 0 in codes
    scale = W.abs().amax(1, keepdim=True).clamp(min=1e-300)
    nearest = codes[((W / scale)[..., None] - codes).abs().argmin(-1)] * scale
    assert_close(round_to_normal_float(W, bits), nearest)


@pytest.mark.parametrize("bits", [2, 4])
def test_loftq_is_the_papers_algorithm(bits):
    W, r = torch.randn(24, 40, dtype=torch.float64), 4
    product, errors = torch.zeros_like(W), []
    for turns in range(1, 4):
        Q = round_to_normal_float(W - product, bits)
        U, S, Vh = torch.linalg.svd(W - Q)
        product = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
        ours, A, B = loftq_init(W, bits, r, turns)
        assert A.shape == (r, 40) and B.shape == (24, r)
        assert_close(ours, Q)
        assert_close(B @ A, product)
        errors.append((W - Q - product).norm())
    assert errors[0] < (W - round_to_normal_float(W, bits)).norm()


def test_factors_of_a_rank_above_the_matrixs_own():
    D = torch.randn(3, 5)
    A, B = closest_factors(D, 7)
    assert A.shape == (7, 5) and B.shape == (3, 7)
    assert_close(B @ A, D)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loftq_initialisation_and_its_files(make, turns, low_cpu_mem_usage, tmp_path):
    base, ids = make(), tokens()
    fresh, targets = copy.deepcopy(base), QV if make is llama else ["c_attn", "c_fc"]
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=targets, init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=2, loftq_iter=turns),
    )  # fmt: skip
    model = get_peft_model(base, config)
    assert model.peft_config["default"].loftq_config == {"loftq_bits": 2, "loftq_iter": turns}
    originals = dict(fresh.named_modules())
    for key, layer in base.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            W = layer.op.to_view(originals[key].weight.detach())
            Q, A, B = loftq_init(W, 2, 4, turns)
            assert_close(layer.op.load()[0], Q)
            assert_close(layer.delta_weight("default"), B @ A, rtol=1e-3, atol=1e-5)
            assert (W - Q - layer.delta_weight("default")).norm() < (W - Q).norm()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_close(logits(loaded, ids), expected, rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(loaded.unload(), tmp_path)  # its weights are quantised already
    assert_close(logits(again, ids), expected, rtol=1e-4, atol=1e-4)


def test_what_loftq_cannot_do_is_refused():
    def loftq(**kw):
        return LoraConfig(**{"target_modules": QV, "init_lora_weights": "loftq", **kw})

    for bad, message in (({"loftq_bits": 3}, "loftq_bits must be 2, 4 or 8, got 3"), ({"loftq_iter": 0}, "got 0"),
                         ({"bits": 4}, r"loftq_config has loftq_bits and loftq_iter, got \['bits'\]")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            loftq(loftq_config=bad)
    with pytest.raises(ValueError, match="no effect unless init_lora_weights is 'loftq'"):
        LoraConfig(loftq_config={"loftq_bits": 4})
    model = get_peft_model(llama(), LoraConfig(target_modules=QV))
    with pytest.raises(ValueError, match="only a model's first adapter"):
        model.add_adapter("b", loftq())
    base = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8))
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="is for linear layers .* this Embedding is not one"):
        get_peft_model(base, loftq(target_modules=["0", "1"]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    packed = nn.Sequential(four_bit("nf4")(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match="packed already: .* replace_lora_weights_loftq"):
        get_peft_model(packed, loftq(target_modules=["0"]))
    with pytest.raises(ValueError, match="no LoRA adapter 'default' on packed linear layers"):
        replace_lora_weights_loftq(get_peft_model(llama(), LoraConfig(target_modules=QV)))


@pytest.mark.parametrize("where", ["name", "folder", "file", "shards"])
def test_replace_lora_weights_loftq(where, folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=by_transformers("nf4"), dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = tokens()
    # A rank so near to the full 64 that little is left over, whatever the weights and the tokens are.
    model = get_peft_model(base, LoraConfig(r=48, lora_alpha=4, target_modules="all-linear")).train()
    before = (model(ids).logits - plain(ids).logits).norm()
    path = {"name": None, "folder": folder, "file": f"{folder}/model.safetensors", "shards": str(tmp_path)}[where]
    if where == "shards":
        plain.save_pretrained(tmp_path, max_shard_size="100KB")
        assert not (tmp_path / "model.safetensors").exists()
    replace_lora_weights_loftq(model, path)
    layers = dict(plain.named_modules())
    for key, layer in model.get_base_model().named_modules():
        if key.endswith("down_proj"):
            lost = layers[key].weight - layer.op.load()[0]
            least = torch.linalg.svdvals(lost.detach().double())[48:].norm()  # that a rank can leave (Eckart, Young)
            left = (lost - layer.delta_weight("default")).detach().double().norm()
            assert_close(left, least, rtol=1e-3, atol=0)
    assert (model(ids).logits - plain(ids).logits).norm() < before


def test_replace_lora_weights_loftq_asks_and_takes_back(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=by_transformers("nf4"), dtype="float32")
    model = get_peft_model(base, LoraConfig(target_modules=QV))
    asked = []

    def callback(changed, name):
        assert changed is model and base.get_submodule(name).lora_B["default"].weight.any()
        asked.append(name)
        return name.endswith("q_proj")

    replace_lora_weights_loftq(model, callback=callback)
    assert len(asked) == 4
    for name in asked:
        assert bool(base.get_submodule(name).lora_B["default"].weight.any()) == name.endswith("q_proj")

    tensors = load_file(f"{folder}/model.safetensors")
    tensors.pop("model.layers.1.self_attn.v_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    kept = base.model.layers[0].self_attn.q_proj.lora_B["default"].weight.clone()
    with pytest.raises(ValueError, match=r"has no model.layers.1.self_attn.v_proj.weight: give the model_path"):
        replace_lora_weights_loftq(model, tmp_path)
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is \(3, 3\), and the layer's weight is \(32, 64\)"):
        replace_lora_weights_loftq(model, tmp_path)
    assert torch.equal(base.model.layers[0].self_attn.q_proj.lora_B["default"].weight, kept)


# The command line


def test_train_evaluate_and_merge_on_the_command_line(tmp_path, capsys, monkeypatch):
    model, data, output = save_llama(tmp_path / "tiny", make_tokenizer()), tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " a number"}) + "\n" for i in range(30)))
    options = ["--data", str(data), "--eval-size", "5", "--max-steps", "4", "--lr", "0.02", "--overwrite"]
    verbosity = transformers.logging.get_verbosity()
    try:
        for quantize, more in (("nf4", ["--packing"]), ("int8", []), ("quanto-int8", [])):
            command = ["train", "--model", model, "--quantize", quantize, "--output", str(output), *options, *more]
            assert not main(command)
            metrics = json.loads((output / "metrics.json").read_text())
            assert metrics["arguments"]["quantize"] == quantize and metrics["after"] < metrics["before"]
            assert not main(["evaluate", str(output), "--check"])
        assert not main(["merge", model, str(output), "-o", str(tmp_path / "merged")])
        monkeypatch.setitem(sys.modules, "torchao", None)
        capsys.readouterr()
        assert main(
            ["train", "--model", model, "--quantize", "torchao-int8", "--output", str(tmp_path / "no"), *options]
        )
        message = "--quantize torchao-int8 needs the package torchao: pip install 'peft[quantize]'"
        assert message in capsys.readouterr().err
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
