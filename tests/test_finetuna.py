"""finetuna: what its README promises on OPT- and GPT-2-shaped models, and the 8-bit layers below it.

The references are bitsandbytes' own functions and a float64 model that is put together here from the formulas.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from tiny_models import gpt2, llama, logits, opt, tokens
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

import peft.finetuna as ft
from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model
from peft.utils import blockwise
from peft.utils.blockwise import BLOCK, Blockwise, BlockwiseEmbedding, BlockwiseLinear

MODELS = {"opt": opt, "gpt2": gpt2}
both = pytest.mark.parametrize("kind", list(MODELS))
TABLE = {"opt": "model.decoder.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
BODY = {
    "opt": {"embed_tokens", "embed_positions", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt2": {"wte", "wpe", "c_attn", "c_proj", "c_fc"},
}


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    return dequantize_blockwise(*quantize_blockwise(weight.detach()))


def randomize(model: PeftModel) -> PeftModel:
    """Give the adapters numbers that change the model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return model.eval()


def step(model: nn.Module, ids: torch.Tensor, count: int = 3) -> list[float]:
    """Losses of a few training steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def memory(model: nn.Module) -> dict[str, int]:
    """Where each frozen tensor of the base model is, by its name in the base model."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    places = {}
    for name, tensor in tensors.items():
        if "lora_" not in name and ".modules_to_save." not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            places[name] = tensor.data_ptr()
    return places


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def adapters(model: PeftModel) -> dict[str, tuple]:
    """Rank, scaling, bias and dropout of each layer."""
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "lora_bias")}
    return {key: (v.r, v.scaling, v.lora_bias, str(v.lora_dropout)) for key, v in layers.items()}


# ---- What the README says ----


README = {
    "opt": {
        "adapt_layers": {"embed_tokens", "embed_positions", "q_proj", "v_proj"},
        "embedding_config": ft.EmbeddingAdapterConfig(r=4, alpha=1),
        "linear_config": {
            "q_proj": ft.LinearAdapterConfig(r=8, alpha=1, dropout=0.0, bias=False),
            "v_proj": ft.LinearAdapterConfig(r=4, alpha=1, dropout=0.1, bias=True),
        },
    },
    "gpt2": {
        "adapt_layers": {"wte", "wpe", "c_attn", "c_fc"},
        "embedding_config": ft.EmbeddingAdapterConfig(r=4, alpha=1),
        "linear_config": {
            "c_attn": ft.LinearAdapterConfig(r=8, alpha=1, dropout=0.0, bias=False),
            "c_fc": ft.LinearAdapterConfig(r=4, alpha=1, dropout=0.1, bias=True),
        },
    },
}


@both
@pytest.mark.parametrize("granular", [False, True])
def test_the_readme_example(kind, granular, tmp_path):
    base, options = MODELS[kind](), README[kind] if granular else {}
    ft.quantize_base_model(base)
    before, prompt = bits(base), tokens()
    model = ft.new_finetuned(base, **options)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        opt.zero_grad()
        output = model(prompt).logits
        loss = nn.functional.mse_loss(output.float(), torch.zeros(output.shape))
        loss.backward()
        opt.step()
    expected = logits(model.eval(), prompt)
    assert not torch.equal(expected, logits(base, prompt))

    torch.save(model.state_dict(), tmp_path / "path.pt")
    torch.save(ft.state_dict(model), tmp_path / "path_finetuned.pt")
    for file, strict in (("path.pt", True), ("path_finetuned.pt", False)):
        other = randomize(ft.new_finetuned(base, **options))
        assert not other.load_state_dict(torch.load(tmp_path / file), strict=strict).unexpected_keys
        assert torch.equal(logits(other, prompt), expected)
    assert (tmp_path / "path_finetuned.pt").stat().st_size < (tmp_path / "path.pt").stat().st_size
    assert same(bits(base), before)
    kinds = {(rank["default"], bias["default"]) for rank, _, bias, _ in adapters(model).values()}
    assert kinds == ({(4, False), (8, False), (4, True)} if granular else {(4, False), (4, True)})


@both
def test_by_default_everything_but_the_head_is_quantised_and_adapted(kind):
    base = MODELS[kind]()
    model = ft.new_finetuned(base)
    body = model.get_base_model()
    packed = [key.removesuffix(".base_layer") for key, m in body.named_modules() if isinstance(m, Blockwise)]
    assert {key.rpartition(".")[2] for key in packed} == BODY[kind]
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if "lora_" in name}
    assert adapted == BODY[kind]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n or "lm_head.modules_to_save" in n}
    assert set(ft.state_dict(model)) == trained
    assert not any(isinstance(module, Blockwise) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    ids = tokens()
    torch.testing.assert_close(logits(model, ids), logits(base, ids), atol=0.05, rtol=0)  # 8 bits, no more


def test_plain_layers_of_the_readme():
    """`layer_norm` is called otherwise in OPT; the README's set is taken, with a warning."""
    base = opt()
    with pytest.warns(PeftWarning, match=r"plain_layers names \['layer_norm'\]"):
        model = ft.new_finetuned(
            base, adapt_layers={"q_proj", "v_proj"}, plain_layers={"lm_head", "out_proj", "layer_norm"}
        )
    plain = ("lm_head", "out_proj")
    for name, parameter in model.named_parameters():
        wanted = "lora_" in name or ".modules_to_save." in name
        assert parameter.requires_grad is wanted, name
        if ".modules_to_save." in name:
            assert any(layer in name for layer in plain) and parameter.dtype == torch.float32
    layer = model.get_base_model().model.decoder.layers[0]
    assert type(layer.self_attn.out_proj.modules_to_save["default"]) is nn.Linear
    assert type(layer.fc1) is BlockwiseLinear and type(layer.self_attn.k_proj) is BlockwiseLinear
    norms = ft.new_finetuned(base, plain_layers={"lm_head", "final_layer_norm"})
    assert any("final_layer_norm.modules_to_save" in name for name in ft.state_dict(norms))


@both
def test_adaptable_names(kind):
    base = MODELS[kind]()
    assert ft.get_lora_adaptable_modules(base) == BODY[kind] | {"lm_head"}
    ft.prepare_base_model(base)
    assert ft.get_lora_adaptable_modules(base) == BODY[kind] | {"lm_head"}
    with pytest.raises(ValueError, match="has adapters already"):
        ft.get_lora_adaptable_modules(ft.new_finetuned(base))


# ---- One memory, several models ----


@both
@pytest.mark.parametrize("quantized", [True, False], ids=["quantised", "clear"])
def test_frozen_tensors_are_shared_and_nothing_else_is(kind, quantized):
    base = MODELS[kind]()
    if quantized:
        ft.quantize_base_model(base)
    first, second = ft.new_finetuned(base), ft.new_finetuned(base)
    few = ft.new_finetuned(base, {"c_proj", "out_proj"} & BODY[kind])
    places = memory(first)
    assert places == memory(second) == memory(few)
    shared = {name for name, place in memory(base).items() if place == places[name]}
    packed = {f"{key}.weight" for key, m in first.get_base_model().named_modules() if isinstance(m, Blockwise)}
    packed = {name.replace(".base_layer", "") for name in packed}
    assert shared == (places.keys() if quantized else places.keys() - packed - {n[:-6] + "absmax" for n in packed})
    assert packed and len(shared) > 10
    own = [{p.data_ptr() for p in m.parameters() if p.requires_grad} for m in (first, second)]
    assert not own[0] & own[1] and not own[0] & {p.data_ptr() for p in base.parameters()}


@both
def test_what_one_model_does_the_others_do_not_see(kind):
    base = MODELS[kind]()
    ft.quantize_base_model(base)
    ids = tokens()
    first, second = randomize(ft.new_finetuned(base)), randomize(ft.new_finetuned(base))
    before = bits(base), bits(second), logits(base, ids), logits(second, ids)

    def untouched():
        return (
            same(bits(base), before[0]) and same(bits(second), before[1])
            and torch.equal(logits(base, ids), before[2]) and torch.equal(logits(second, ids), before[3])
        )  # fmt: skip

    losses = step(first.train(), ids, 20)
    assert losses[-1] < losses[0] / 2 and untouched()
    first.merge_adapter()
    assert untouched()
    first.unmerge_adapter()
    first.to(torch.bfloat16)
    assert first(ids).logits.dtype == torch.bfloat16 and untouched()
    first.merge_and_unload()
    assert untouched()
    other = MODELS[kind]()
    ft.quantize_base_model(other)
    merged = ft.new_finetuned(base).merge_and_unload()
    merged.load_state_dict(other.state_dict(), strict=False)
    assert untouched()
    third = ft.new_finetuned(base).eval()
    third.load_state_dict(ft.new_finetuned(other).state_dict())  # another base model's numbers: into its own memory
    assert torch.equal(logits(third, ids), logits(other, ids)) and untouched()
    assert memory(third)[TABLE[kind]] != memory(base)[TABLE[kind]]


@both
def test_models_train_in_threads_and_go_one_by_one(kind):
    base = MODELS[kind]()
    ft.quantize_base_model(base)
    models, inputs, before = [ft.new_finetuned(base).eval() for _ in range(2)], [tokens(), tokens()], bits(base)
    alone = copy.deepcopy(models)
    for work in zip(alone, inputs):
        thread = threading.Thread(target=step, args=work)
        thread.start()
        thread.join()
    threads = [threading.Thread(target=step, args=work) for work in zip(models, inputs)]
    for do in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            do(thread)
    assert all(same(ft.state_dict(left), ft.state_dict(right)) for left, right in zip(models, alone))

    kept = models.pop()
    gone = weakref.ref(next(p for p in models[0].parameters() if p.requires_grad))
    expected = logits(kept, inputs[1])
    del models, alone, threads, thread, work
    gc.collect()
    assert gone() is None
    assert torch.equal(logits(kept, inputs[1]), expected) and same(bits(base), before)


def test_siblings_share_what_is_quantised_for_them_only_while_it_is_the_same():
    base = llama()
    first = ft.new_finetuned(base)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.data.add_(1)
    second, third = ft.new_finetuned(base), ft.new_finetuned(base)
    differ = [name for name, place in memory(first).items() if place != memory(second)[name]]
    assert differ == [f"model.layers.0.mlp.up_proj.{name}" for name in ("weight", "absmax")]
    assert memory(second) == memory(third)
    kept = [weakref.ref(parameter) for parameter in first.parameters() if parameter.dtype == torch.int8]
    del first
    assert kept and all(ref() is None for ref in kept)


def test_running_statistics_are_each_models_own():
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    base[2].register_buffer("constant", torch.ones(3), persistent=False)
    model = ft.new_finetuned(base)
    model.train()(torch.randn(8, 4))
    assert model.get_base_model()[1].running_mean.any() and not base[1].running_mean.any()
    assert model.get_base_model()[2].base_layer.constant.data_ptr() == base[2].constant.data_ptr()


# ---- Numbers ----


def reference_loss(base: nn.Module, model: PeftModel, ids: torch.Tensor):
    """The loss in float64 from the original weights, as the formulas say, and the leaves to take gradients of."""
    base, leaves, weights = copy.deepcopy(base).double(), {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaves[name] = parameter.detach().double().requires_grad_()
    for key, layer in base.named_modules():
        prefix = f"base_model.model.{key}"
        if isinstance(layer, nn.Embedding) or type(layer).__name__ in ("Linear", "Conv1D"):
            if key == "lm_head":
                weights["lm_head.weight"] = leaves[f"{prefix}.modules_to_save.default.weight"]
                continue
            W = round_trip(layer.weight.float()).double()
            if isinstance(layer, nn.Embedding):
                A, B = (leaves[f"{prefix}.lora_embedding_{x}.default"] for x in "AB")
                weights[f"{key}.weight"] = W + (0.5 * B @ A).T
            else:
                names = ("A.default.weight", "B.default.weight", "B.default.bias")
                A, B, b = (leaves[f"{prefix}.lora_{name}"] for name in names)
                delta = 0.5 * B @ A
                weights[f"{key}.weight"] = W + (delta.T if type(layer).__name__ == "Conv1D" else delta)
                weights[f"{key}.bias"] = layer.bias.detach() + 0.5 * b
    output = torch.func.functional_call(base, weights, (ids,), {"labels": ids}, tie_weights=False)
    return output, leaves


@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_the_formulas(kind, checkpointing):
    base = MODELS[kind]()
    model = randomize(
        ft.new_finetuned(
            base, embedding_config=ft.EmbeddingAdapterConfig(2, 1), linear_config=ft.LinearAdapterConfig(4, 2)
        )
    )
    if checkpointing:
        for part in model.modules():
            for name in {"p", "dropout"} & vars(part).keys():
                setattr(part, name, 0.0)
        model.train()
        model.get_base_model().gradient_checkpointing_enable()
    ids = tokens()
    output = model(ids, labels=ids)
    expected, leaves = reference_loss(base, model, ids)
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    expected.loss.backward()
    parameters = dict(model.named_parameters())
    assert len(leaves) == len(ft.state_dict(model)) > 10
    for name, leaf in leaves.items():
        torch.testing.assert_close(parameters[name].grad.double(), leaf.grad, rtol=1e-3, atol=1e-5, msg=name)


@both
def test_merged_is_what_was_trained_as_far_as_8_bits_go(kind):
    model, ids = randomize(ft.new_finetuned(MODELS[kind]())), tokens()
    before = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    merged = model.merge_and_unload()
    assert {type(m) for m in merged.modules() if isinstance(m, Blockwise)} == {BlockwiseLinear, BlockwiseEmbedding}
    assert (logits(merged, ids) - before).norm() < 0.2 * (before - base).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (70, 301), (1, 3 * BLOCK)])
def test_packing_is_bitsandbytes_own_in_chunks(dtype, shape, monkeypatch):
    monkeypatch.setattr(blockwise, "CHUNK", 2 * BLOCK)
    weight = torch.randn(shape).to(dtype)
    packed, absmax = blockwise.pack(weight)
    expected, state = quantize_blockwise(weight if dtype != torch.float64 else weight.float())
    assert packed.shape == weight.shape and packed.dtype == torch.int8
    assert torch.equal(packed.view(torch.uint8), expected) and torch.equal(absmax, state.absmax)
    unpacked = blockwise.unpack(packed, absmax, dtype)
    assert unpacked.dtype == dtype and torch.equal(unpacked, dequantize_blockwise(expected, state).to(dtype))


def test_packing_takes_one_layer_at_a_time(monkeypatch):
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in base]
    alive = []
    pack = blockwise.pack
    monkeypatch.setattr(blockwise, "pack", lambda w: alive.append(sum(r() is not None for r in weights)) or pack(w))
    ft.quantize_base_model(base)
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_dequantised_table(dtype):
    table = nn.Embedding(300, 37).to(dtype)  # rows that cross blocks
    ids = torch.randint(300, (3, 5), dtype=torch.int32)
    expected = round_trip(table.weight)[ids]
    ft.quantize_base_model(model := nn.Sequential(table))
    assert model[0] is table and torch.equal(table(ids), expected)
    with pytest.raises(IndexError):
        table(torch.tensor([-1]))


def test_scaled_and_shifted_embeddings():
    """Gemma's tables multiply their rows, OPT's positions shift the row: also without 8 bits."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    scaled = Gemma3TextScaledWordEmbedding(50, 16, 0, embed_scale=4.0)
    ids = tokens()
    expected = 4 * round_trip(scaled.weight)[ids]
    ft.quantize_base_model(nn.Sequential(scaled))
    torch.testing.assert_close(scaled(ids), expected)
    for quantize in (True, False):
        base = opt()
        model = randomize(ft.new_finetuned(base, {"embed_positions"}, do_not_quantize=not quantize))
        positions = model.get_base_model().model.decoder.embed_positions
        A, B = positions.lora_embedding_A["default"], positions.lora_embedding_B["default"]
        table = base.model.decoder.embed_positions.weight
        table = (round_trip(table) if quantize else table) + (B @ A).T / 4
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        torch.testing.assert_close(positions(mask), table[torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]])])
        torch.testing.assert_close(positions(mask, 3), table[torch.tensor([[4], [5]])])
        torch.testing.assert_close(positions(mask, position_ids=torch.tensor([[7]])), table[torch.tensor([[9]])])
        with torch.no_grad():
            before = positions(mask, 1)
            model.merge_adapter()
            torch.testing.assert_close(positions(mask, 1), before, atol=1e-6 if not quantize else 0.1, rtol=0)
            model.unmerge_adapter()
        model.double()  # so that of two tokens that are nearly as likely rounding does not decide
        ids = tokens(3, 6)
        generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        for _ in range(4):  # without a cache
            ids = torch.cat([ids, logits(model, ids)[:, -1:].float().argmax(-1)], dim=1)  # `generate` compares float32
        assert torch.equal(generated, ids)


def test_bases_that_look_at_their_weights():
    """T5 casts to a weight's dtype unless that is int8."""
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config).eval()
    ids = tokens()
    before = base(input_ids=ids, labels=ids).logits
    model = ft.new_finetuned(base)
    after = model(input_ids=ids, labels=ids)
    assert (after.logits - before).norm() < 0.3 * before.norm()  # 8 bits lose a thirtieth
    after.loss.backward()
    model = ft.new_finetuned(nn.ModuleDict({"m": nn.MultiheadAttention(8, 2), "q": nn.Linear(8, 8)}))
    assert type(model.get_base_model()["m"].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


def test_casts_keep_the_scales_and_set_what_is_computed_in():
    layer = nn.Linear(8, 8)
    layer.weight.data.mul_(1e6)  # beyond float16
    ft.quantize_base_model(model := nn.Sequential(layer, nn.Embedding(5, 8)))
    absmax = layer.absmax.clone()
    model.half()
    assert torch.equal(layer.absmax, absmax) and layer.absmax.dtype == torch.float32
    assert layer.dequantized().dtype == model[1](torch.tensor([1])).dtype == torch.float16
    model.double()
    assert model[1](torch.tensor([1])).dtype == torch.float64 and torch.equal(layer.absmax, absmax)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_no_dequantised_weight_is_kept_for_the_backward_pass():
    ft.quantize_base_model(model := nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)))
    x, kept = torch.randn(2, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert kept and not [t.shape for t in kept if t.is_floating_point() and t.numel() >= 32 * 64]
    y.sum().backward()
    assert x.grad.any()


# ---- Files, copies, training ----


@both
@pytest.mark.parametrize("quantize", [True, False])
def test_saved_models_load_on_a_base_that_is_quantised_anew(kind, quantize, tmp_path):
    start = MODELS[kind]()
    linear = {"c_fc": ft.LinearAdapterConfig(2, 3, 0.1, False), "c_attn": ft.LinearAdapterConfig(3, bias=True)}
    if kind == "opt":
        linear = {"fc1": linear["c_fc"], "layers.1.fc2": linear["c_attn"]}
    embeddings = BODY[kind] & {"wte", "embed_tokens"}
    norm = "ln_f" if kind == "gpt2" else "decoder.final_layer_norm"
    model = ft.new_finetuned(
        start, {*linear, *embeddings}, linear_config=linear, modules_not_to_freeze={norm},
        modules_not_to_quantize={"c_attn", "k_proj"} & BODY[kind], do_not_quantize=not quantize,
    )  # fmt: skip
    ids = tokens()
    step(model.train(), ids)
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    again = ft.load_finetuned(start, tmp_path)
    assert torch.equal(logits(again, ids), expected) and memory(again) == memory(model)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    fresh = copy.deepcopy(start)
    if quantize:
        ft.quantize_base_model(fresh, {"lm_head", norm, *({"c_attn", "k_proj"} & BODY[kind])})
    other = ft.load_finetuned(fresh, tmp_path, is_trainable=True)
    assert torch.equal(logits(other.eval(), ids), expected)
    assert set(ft.state_dict(other)) == {name for name, p in other.named_parameters() if p.requires_grad}
    plain = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(plain, ids), expected)
    assert adapters(again) == adapters(model) and len(adapters(model)) > 2


def test_the_packed_table_is_not_saved_with_each_model(tmp_path, recwarn):
    base = opt()
    ft.quantize_base_model(base)
    model = ft.new_finetuned(base)
    model.save_pretrained(tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, PeftWarning)]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32} and len(saved) == len(ft.state_dict(model))


@both
def test_copies_and_pickles_are_whole(kind):
    model, ids = randomize(ft.new_finetuned(MODELS[kind]())), tokens()
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), expected)
        assert not set(memory(twin).values()) & set(memory(model).values()) - {0}
        twin.load_state_dict(ft.new_finetuned(MODELS[kind]()).state_dict())
        assert torch.equal(logits(model, ids), expected) and not torch.equal(logits(twin, ids), expected)


def test_training_with_the_trainer(tmp_path):
    base = gpt2()
    ft.quantize_base_model(base)
    model = ft.new_finetuned(base)
    answer = torch.full((6,), 5)  # the same after everything: learned in a few steps whatever the model is
    rows = [{"input_ids": ids, "labels": answer} for ids in tokens(8, 6)]
    arguments = TrainingArguments(
        tmp_path, max_steps=30, learning_rate=0.01, gradient_checkpointing=True, use_cpu=True, report_to=[],
        per_device_train_batch_size=4, disable_tqdm=True, logging_steps=5, save_steps=30,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    ids = tokens()
    again = ft.load_finetuned(base, tmp_path / "checkpoint-30")
    assert torch.equal(logits(again, ids), logits(model.eval(), ids))


def test_tied_heads(tmp_path):
    base, ids = opt(), tokens()
    assert base.lm_head.weight is base.model.decoder.embed_tokens.weight
    expected = logits(base, ids)
    plain = ft.new_finetuned(base, plain_layers={"lm_head", "embed_tokens"})
    head, table = (n for n in ft.state_dict(plain) if "modules_to_save" in n)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    assert parameters[head] is parameters[table]  # what the base ties is trained as one
    step(plain.train(), ids)
    plain.save_pretrained(tmp_path)
    again = ft.load_finetuned(base, tmp_path, is_trainable=True)
    parameters = dict(again.named_parameters(remove_duplicate=False))
    assert parameters[head] is parameters[table] and torch.equal(logits(again.eval(), ids), logits(plain.eval(), ids))

    config, decoder = base.config, base.model.decoder
    ft.quantize_base_model(base, modules_not_to_quantize=set())
    assert base.lm_head.weight.data_ptr() == decoder.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(logits(base, ids), expected, atol=0.05, rtol=0)
    model = randomize(ft.new_finetuned(base, plain_layers=set()))
    assert torch.equal(logits(ft.new_finetuned(base, {"fc1"}, plain_layers=set()), ids), logits(base, ids))
    step(model, ids)
    base.tie_weights()  # as transformers does after loading: the packed table stays where it is
    assert base.lm_head.weight.dtype == torch.int8
    assert config.tie_word_embeddings and not base.config.tie_word_embeddings and base.config is decoder.config


def test_other_adapters_work_on_quantised_bases():
    base, ids = opt(), tokens()
    ft.quantize_base_model(base)
    before = bits(base)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    step(model.train(), ids)
    base = model.unload()
    assert same(bits(base), before)


# ---- Errors ----


def test_quantising_twice_is_refused():
    base = opt()
    ft.quantize_base_model(base, {"layers.0", "lm_head"})
    assert type(base.model.decoder.layers[0].fc1) is nn.Linear
    with pytest.raises(ValueError, match="quantised already"):
        ft.quantize_base_model(base)
    with pytest.raises(ValueError, match="has adapters already"):
        ft.quantize_base_model(ft.new_finetuned(base))
    with pytest.raises(ValueError, match="has adapters already"):
        ft.new_finetuned(ft.new_finetuned(base))


@pytest.mark.parametrize("argument", ["plain_layers", "modules_not_to_quantize", "modules_not_to_freeze"])
def test_what_is_quantised_cannot_be_had_back(argument):
    base = opt()
    ft.quantize_base_model(base)
    before = bits(base)
    wish = {argument: {"fc1"}, "adapt_layers": {"q_proj"}}
    with pytest.raises(ValueError, match="8 bits"):
        ft.new_finetuned(base, **wish)
    with pytest.raises(ValueError, match="original weights are gone.*modules_not_to_quantize"):
        ft.new_finetuned(base, **wish, do_not_quantize=True)
    assert same(bits(base), before)


BAD = {
    "plain and adapted": ({"adapt_layers": {"lm_head"}}, ValueError, "lm_head cannot be adapted and train whole"),
    "inside a plain one": ({"adapt_layers": {"fc1"}, "plain_layers": {"layers.1"}}, ValueError, r"layers\.1\.fc1 can"),
    "not frozen and adapted": ({"modules_not_to_freeze": {"fc1"}}, ValueError, "out of modules_not_to_freeze"),
    "not frozen but quantised": (
        {"adapt_layers": {"fc2"}, "modules_not_to_freeze": {"fc1"}}, ValueError, "in 8 bits cannot train",
    ),
    "unknown": ({"adapt_layers": {"q_proj", "embed_posotions"}}, ValueError, r"\['embed_posotions'\].*embed_positions"),
    "not adaptable": ({"adapt_layers": {"final_layer_norm"}}, ValueError, "no linear layer"),
    "nothing": ({"adapt_layers": set(), "plain_layers": set()}, ValueError, "Nothing would train"),
    "no entry": ({"linear_config": {"fc1": ft.LinearAdapterConfig()}}, ValueError, "no entry for .*_proj"),
    "no embedding entry": ({"embedding_config": {}}, ValueError, "embedding_config has no entry"),
    "of another kind": ({"linear_config": ft.EmbeddingAdapterConfig()}, TypeError, "must hold LinearAdapterConfig"),
    "string": ({"plain_layers": "lm_head"}, TypeError, "set of names"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_wishes_are_refused(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ft.new_finetuned(opt(), **options)


@pytest.mark.parametrize("values", [{"r": 0}, {"r": 1.5}, {"dropout": 1.0}, {"bias": "yes"}])
def test_bad_adapters_are_refused_by_the_names_of_their_fields(values):
    with pytest.raises((ValueError, TypeError), match=rf"\b{next(iter(values))}\b"):
        ft.LinearAdapterConfig(**values)


def test_bad_layers_are_refused_before_anything_is_changed():
    for last, message in (
        (nn.Linear(4, 4, device="meta"), "1 cannot be quantised: its weight is not here"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed from other parameters"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm=1.0"),
    ):
        base = nn.Sequential(nn.Linear(4, 4), last)
        with pytest.raises(ValueError, match=message):
            ft.quantize_base_model(base)
        assert type(base[0]) is nn.Linear
        ft.quantize_base_model(base, {"1"})
    base = nn.Sequential(nn.Linear(4, 4))
    base[0].weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        ft.quantize_base_model(base)


def test_load_finetuned_takes_its_own_only(tmp_path):
    get_peft_model(opt(), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a model of finetuna's"):
        ft.load_finetuned(opt(), tmp_path)
    with pytest.raises(TypeError, match="new_finetuned"):
        ft.state_dict(opt())


def test_a_head_alone_can_train(tmp_path):
    base, ids = opt(), tokens()
    model = ft.new_finetuned(base, adapt_layers=set())
    assert list(ft.state_dict(model)) == ["base_model.model.lm_head.modules_to_save.default.weight"]
    step(model.train(), ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(ft.load_finetuned(base, tmp_path), ids), logits(model.eval(), ids))


def test_unused_entries_are_warned_of():
    with pytest.warns(PeftWarning, match=r"linear_config has entries that no adapted layer uses: \['fc2'\]"):
        ft.new_finetuned(opt(), {"fc1"}, linear_config=dict.fromkeys(("fc1", "fc2"), ft.LinearAdapterConfig()))
