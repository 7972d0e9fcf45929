"""diffusers on this package: LoRA (and LoKr) in tiny random UNets, transformers and the pipelines around them.

The plain formulation is a model without adapters, into whose weights the products of the factors are added.
"""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel

from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

FILE = "pytorch_lora_weights.safetensors"
CLOSE = {"atol": 1e-9, "rtol": 1e-7}
STEP = torch.tensor([3])


@pytest.fixture(scope="module", autouse=True)
def quiet():
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity_warning()


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).double().eval()  # fmt: skip


def make_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    ).double().eval()  # fmt: skip


def unet_inputs() -> dict:
    return {
        "sample": torch.randn(1, 4, 8, 8).double(),
        "timestep": STEP,
        "encoder_hidden_states": torch.randn(1, 5, 16).double(),
    }


def flux_inputs() -> dict:
    return {
        "hidden_states": torch.randn(1, 6, 4).double(),
        "encoder_hidden_states": torch.randn(1, 5, 12).double(),
        "pooled_projections": torch.randn(1, 10).double(),
        "timestep": torch.tensor([0.3]).double(),
        "img_ids": torch.randn(6, 3).double(),
        "txt_ids": torch.zeros(5, 3).double(),
    }


KINDS = {  # model, its inputs, targets: attention, and a convolution or a projection of another shape
    "unet": (make_unet, unet_inputs, ["to_q", "to_v", "conv1"]),
    "flux": (make_flux, flux_inputs, ["to_q", "to_v", "proj_mlp"]),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def run(model: nn.Module, inputs: dict, **kw) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kw).sample


def tensors_of(model: nn.Module, **kw) -> dict[str, torch.Tensor]:
    """The tensors, by their keys in files, of a random LoRA for a copy of the model."""
    other = copy.deepcopy(model)
    config = LoraConfig(**{"r": 2, "lora_alpha": 2, "init_lora_weights": False, **kw})
    other = inject_adapter_in_model(config, other, "made").double()
    return {key: 0.5 * torch.randn_like(t) for key, t in get_peft_model_state_dict(other, adapter_name="made").items()}


def with_products(model: nn.Module, *adapters: tuple[dict[str, torch.Tensor], float]) -> nn.Module:
    """A copy of a plain model, with the product of each adapter's factors, times its scaling, in the weights."""
    model = copy.deepcopy(model)
    for tensors, scaling in adapters:
        for key in (key for key in tensors if key.endswith(".lora_A.weight")):
            weight = model.get_submodule(key.removesuffix(".lora_A.weight")).weight
            A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            weight.data += scaling * (B.flatten(1) @ A.flatten(1)).view_as(weight)
    return model


def layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


# Models


@kinds
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_add_train_save_and_load(kind, use_dora, tmp_path):
    make, inputs, targets = KINDS[kind]
    model, inputs = make(), inputs()
    plain, before = copy.deepcopy(model), run(model, inputs)
    pattern = {"to_v": 3}
    config = LoraConfig(r=2, lora_alpha=6, rank_pattern=pattern, target_modules=targets, use_dora=use_dora)
    model.add_adapter(config, "mine")
    assert_close(run(model, inputs), before, **CLOSE)  # DoRA divides by what it multiplies with
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".mine." in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = run(model, inputs)
    assert not torch.allclose(after, before, atol=1e-6)

    model.save_lora_adapter(tmp_path, adapter_name="mine")
    keys = load_file(tmp_path / FILE).keys()
    assert keys == {name.replace(".mine", "").replace("vector.weight", "vector") for name in trained}
    for low_cpu_mem_usage in (False, True):  # the metadata of the file holds ranks and alphas
        again = copy.deepcopy(plain)
        again.load_lora_adapter(
            tmp_path, prefix=None, weight_name=FILE, adapter_name="yours", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert_close(run(again, inputs), after, **CLOSE)
        assert not any(parameter.is_meta for parameter in again.parameters())
        assert again.peft_config["yours"].lora_alpha == 6 and again.peft_config["yours"].rank_pattern == pattern
    with pytest.raises(ValueError, match="already in use"):
        again.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE, adapter_name="yours")


@kinds
def test_several_adapters_with_weights_of_their_own(kind):
    make, inputs, targets = KINDS[kind]
    model, inputs = make(), inputs()
    plain = copy.deepcopy(model)
    a = tensors_of(plain, target_modules=targets)
    b = tensors_of(plain, target_modules=targets[1:], r=4, rank_pattern={targets[2]: 3})
    model.load_lora_adapter(dict(a), prefix=None, adapter_name="a")
    model.load_lora_adapter(dict(b), prefix=None, adapter_name="b")  # without metadata: the scaling is 1
    assert model.peft_config["b"].rank_pattern

    def check(*adapters):
        assert_close(run(model, inputs), run(with_products(plain, *adapters), inputs), **CLOSE)

    for names, weights, expected in [
        ("a", None, [(a, 1)]),
        ("b", 0.25, [(b, 0.25)]),
        (["a", "b"], [0.75, -0.5], [(a, 0.75), (b, -0.5)]),
        (["b", "a"], 2.0, [(a, 2), (b, 2)]),
        (["a", "b"], [None, 0.5], [(a, 1), (b, 0.5)]),
    ]:
        model.set_adapters(names, weights)
        assert model.active_adapters() == ([names] if isinstance(names, str) else names)
        check(*expected)
    if kind == "unet":
        c = tensors_of(plain, target_modules=["to_q"])
        model.load_lora_adapter(dict(c), prefix=None, adapter_name="c")
        scale = {"down_": 0.5, "mid_": 0.0, "up_": 2.0}
        model.set_adapters(["c", "b"], [{"down": 0.5, "mid": 0.0, "up": {"block_0": 2.0}}, 1.0])
        parts = [({k: t for k, t in c.items() if k.startswith(start)}, factor) for start, factor in scale.items()]
        assert all(part for part, _ in parts) and sum(len(part) for part, _ in parts) == len(c)
        check(*parts, (b, 1.0))
        model.delete_adapters("c")

    model.set_adapters(["a", "b"], [0.75, -0.5])
    model.disable_lora()
    assert torch.equal(run(model, inputs), run(plain, inputs))
    model.enable_lora()
    check((a, 0.75), (b, -0.5))
    name = "cross_attention_kwargs" if kind == "unet" else "joint_attention_kwargs"
    scaled = run(with_products(plain, (a, 0.3 * 0.75), (b, 0.3 * -0.5)), inputs)
    assert_close(run(model, inputs, **{name: {"scale": 0.3}}), scaled, **CLOSE)
    check((a, 0.75), (b, -0.5))

    model.delete_adapters("a")
    assert list(model.peft_config) == ["b"]
    check((b, -0.5))
    model.unload_lora()
    assert not layers(model) and torch.equal(run(model, inputs), run(plain, inputs))
    assert model.state_dict().keys() == plain.state_dict().keys()


@kinds
def test_fusing_and_back(kind):
    make, inputs, targets = KINDS[kind]
    model, inputs = make(), inputs()
    plain = copy.deepcopy(model)
    a, b = (tensors_of(plain, target_modules=targets) for _ in range(2))
    for name, tensors in (("a", a), ("b", b)):
        model.load_lora_adapter(dict(tensors), prefix=None, adapter_name=name)
    model.set_adapters(["a", "b"], [1.0, 0.5])
    both = run(with_products(plain, (a, 1), (b, 0.5)), inputs)
    model.fuse_lora(safe_fusing=True)
    assert_close(run(model, inputs), both, **CLOSE)
    assert all(layer.merged_adapters == ["a", "b"] for layer in layers(model))
    model.unfuse_lora()
    assert_close(run(model, inputs), both, **CLOSE)
    model.fuse_lora(lora_scale=0.5, adapter_names=["b"])
    fused = with_products(plain, (b, 0.25))
    for layer in layers(model):
        name = next(name for name, module in model.named_modules() if module is layer)
        assert_close(layer.get_base_layer().weight, fused.get_submodule(name).weight, **CLOSE)
    model.unfuse_lora()
    model.unload_lora()
    assert_close(run(model, inputs), run(plain, inputs), **CLOSE)

    model.load_lora_adapter(dict(a), prefix=None, adapter_name="a")
    broken = copy.deepcopy(model)
    factor = layers(broken)[0].lora_A["a"].weight
    factor.data[0] = torch.inf
    with pytest.raises(ValueError, match="a"):
        broken.fuse_lora(safe_fusing=True)
    model.fuse_lora()  # what many do before they throw the adapter away
    model.unload_lora()
    assert_close(run(model, inputs), run(with_products(plain, (a, 1)), inputs), **CLOSE)


@pytest.mark.parametrize("kind, compiled", [("unet", False), ("flux", True)])
def test_adapters_take_each_others_place(kind, compiled):
    make, inputs, targets = KINDS[kind]
    model, inputs = make(), inputs()
    plain = copy.deepcopy(model)
    ranks = (2, 5, 1)
    first, *others = (tensors_of(plain, target_modules=targets, r=rank, lora_alpha=rank) for rank in ranks)
    model.enable_lora_hotswap(target_rank=max(ranks))
    model.load_lora_adapter(dict(first), prefix=None, adapter_name="a")
    graphs = []
    if compiled:
        torch._dynamo.reset()
        model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert_close(run(model, inputs), run(with_products(plain, (first, 1)), inputs), **CLOSE)
    count = len(graphs)
    assert (count > 0) == compiled
    for tensors in others:
        model.load_lora_adapter(dict(tensors), prefix=None, adapter_name="a", hotswap=True)
        assert_close(run(model, inputs), run(with_products(plain, (tensors, 1)), inputs), **CLOSE)
    assert len(graphs) == count  # nothing is compiled again
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        model.load_lora_adapter(dict(first), prefix=None, adapter_name="b", hotswap=True)
    wide = tensors_of(plain, target_modules=[*targets, "to_k"])
    with pytest.raises(RuntimeError, match="tensors have no place in adapter 'a'"):
        model.load_lora_adapter(wide, prefix=None, adapter_name="a", hotswap=True)


@pytest.mark.parametrize("decompose_both", [False, True])
def test_lokr_adapters_load(decompose_both):
    """diffusers reads rank and factors off the shapes, by our own factorization."""
    make, inputs, targets = KINDS["flux"]
    model, inputs = make(), inputs()
    made = inject_adapter_in_model(
        LoKrConfig(r=1, alpha=1, target_modules=targets, decompose_both=decompose_both, init_weights=False),
        copy.deepcopy(model),
        "made",
    ).double()
    tensors = get_peft_model_state_dict(made, adapter_name="made")
    model.load_lora_adapter(tensors, prefix=None, adapter_name="a")
    assert not torch.allclose(run(make_flux(), inputs), run(model, inputs), atol=1e-3)
    assert_close(run(model, inputs), run(made, inputs), **CLOSE)
    model.set_adapters("a", 0.0)
    off = run(model, inputs)
    model.unload_lora()
    assert_close(off, run(model, inputs), **CLOSE)


@kinds
@pytest.mark.parametrize("case", ["adapter first", "adapter first, cast too", "casting first"])
def test_layerwise_casting_of_a_model_with_an_adapter(kind, case):
    """Weights lie in 8 bits and are cast around each layer's forward, by a hook; factors' if one asks for it."""
    make, inputs, targets = KINDS[kind]
    model, inputs = make().float(), {k: v.float() if v.is_floating_point() else v for k, v in inputs().items()}
    rounded = copy.deepcopy(model)
    tensors = {key: tensor.float() for key, tensor in tensors_of(model, target_modules=targets).items()}
    store, factors_too = torch.float8_e4m3fn, case.endswith("cast too")
    load = {"prefix": None, "adapter_name": "a"}
    if case != "casting first":
        model.load_lora_adapter(dict(tensors), **load)
    patterns = {"skip_modules_pattern": ("norm", "pos_embed")} if factors_too else {}
    model.enable_layerwise_casting(storage_dtype=store, compute_dtype=torch.float32, **patterns)
    if case == "casting first":
        model.load_lora_adapter(dict(tensors), **load)
    rounded.load_lora_adapter(dict(tensors), **load)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == store}
    assert any("lora_A" in name for name in stored) == factors_too
    assert any("base_layer" in name for name in stored)
    for name, parameter in rounded.named_parameters():
        if name in stored:
            parameter.data = parameter.data.to(store).float()
    assert_close(run(model, inputs), run(rounded, inputs), atol=1e-4, rtol=1e-3)
    if not factors_too:
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.fuse_lora()
        rounded.fuse_lora()
        for layer, wide in zip(layers(model), layers(rounded)):
            assert_close(layer.get_base_layer().weight.float(), wide.get_base_layer().weight.to(store).float())
        model.unfuse_lora()
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor.float(), before[key].float()), key


# Pipelines


def stable_diffusion() -> StableDiffusionPipeline:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    parts = {
        "unet": make_unet(),
        "vae": AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=8, **sizes)),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
    }
    others = {"tokenizer": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, **others).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux() -> FluxPipeline:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    parts = {
        "transformer": make_flux(),
        "vae": AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=1, **blocks),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    others = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = FluxPipeline(**parts, **others).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline, ids: torch.Tensor, latents: torch.Tensor, **kw) -> torch.Tensor:
    """What a Stable Diffusion pipeline makes of tokens, in latent space."""
    with torch.no_grad():
        prompt = pipeline.text_encoder(ids).last_hidden_state
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", **kw}
    return pipeline(prompt_embeds=prompt, latents=latents, **options).images


def kohya(tensors: dict[str, torch.Tensor], prefix: str, alpha: float) -> dict[str, torch.Tensor]:
    """The tensors under the names that kohya's scripts give them: dots are underscores, the alphas lie beside."""
    renamed = {}
    for key, tensor in tensors.items():
        module, factor, _ = key.rsplit(".", 2)
        name = f"{prefix}_{module.replace('.', '_')}"
        renamed[f"{name}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor
        renamed[f"{name}.alpha"] = torch.tensor(alpha).double()
    return renamed


def test_a_stable_diffusion_pipeline(tmp_path):
    pipeline = stable_diffusion()
    unet, text = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.text_encoder)
    ids, latents = torch.randint(50, (1, 6)), torch.randn(1, 4, 8, 8).double()
    before = picture(pipeline, ids, latents)

    def expected(*adapters) -> torch.Tensor:
        other = stable_diffusion()
        other.unet = with_products(unet, *((parts[0], scaling) for parts, scaling, _ in adapters))
        other.text_encoder = with_products(text, *((parts[1], scaling) for parts, _, scaling in adapters))
        return picture(other, ids, latents)

    a, b = (
        (tensors_of(unet, target_modules=["to_q", "to_v"]), tensors_of(text, target_modules=["q_proj", "out_proj"]))
        for _ in "ab"
    )
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=a[0], text_encoder_lora_layers=a[1])
    pipeline.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="a")
    assert_close(picture(pipeline, ids, latents), expected((a, 1, 1)), **CLOSE)
    prefixes = ("lora_unet", "lora_te_text_model")
    files = [kohya(tensors, prefix, alpha=3.0) for tensors, prefix in zip(b, prefixes)]
    pipeline.load_lora_weights(files[0] | files[1], adapter_name="b")  # rank 2: the scaling is 1.5
    assert pipeline.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    pipeline.set_adapters("b")
    assert_close(picture(pipeline, ids, latents), expected((b, 1.5, 1.5)), **CLOSE)
    pipeline.set_adapters(["a", "b"], [0.5, {"unet": 2.0, "text_encoder": 0.25}])
    assert pipeline.get_active_adapters() == ["a", "b"]
    both = expected((a, 0.5, 0.5), (b, 3.0, 0.375))
    assert_close(picture(pipeline, ids, latents), both, **CLOSE)

    pipeline.fuse_lora()
    assert pipeline.num_fused_loras == 2
    assert_close(picture(pipeline, ids, latents), both, **CLOSE)
    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    assert_close(picture(pipeline, ids, latents), both, **CLOSE)
    pipeline.disable_lora()
    assert_close(picture(pipeline, ids, latents), before, **CLOSE)
    pipeline.enable_lora()
    pipeline.set_lora_device(["b"], "meta")
    devices = {name: {layer.lora_A[name].weight.device.type for layer in layers(pipeline.unet)} for name in "ab"}
    assert devices == {"a": {"cpu"}, "b": {"meta"}}
    pipeline.delete_adapters("b")
    pipeline.set_adapters("a")
    assert_close(picture(pipeline, ids, latents), expected((a, 1, 1)), **CLOSE)
    scaled = picture(pipeline, ids, latents, cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(scaled, picture(pipeline, ids, latents), atol=1e-3)
    pipeline.unload_lora_weights()
    assert not layers(pipeline.unet) and not layers(pipeline.text_encoder)
    assert_close(picture(pipeline, ids, latents), before, **CLOSE)


def test_a_flux_pipeline(tmp_path):
    pipeline = flux()
    plain = copy.deepcopy(pipeline.transformer)
    latents = torch.randn(1, 4, 4).double()
    prompt = {"prompt_embeds": torch.randn(1, 5, 12).double(), "pooled_prompt_embeds": torch.randn(1, 10).double()}
    sizes = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 0.0}

    def make(transformer=None) -> torch.Tensor:
        other = flux() if transformer is not None else pipeline
        other.transformer = transformer or pipeline.transformer
        return other(latents=latents, **prompt, **sizes).images

    before = make()
    patterns = dict.fromkeys(["rank_pattern", "alpha_pattern"], {"proj_mlp": 3})
    a = tensors_of(plain, target_modules=["to_q", "proj_mlp"], **patterns)
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=a)
    for name in ("a", "b"):
        pipeline.load_lora_weights(tmp_path, weight_name=FILE, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.5, 1.0])
    expected = make(with_products(plain, (a, 1.5)))
    assert not torch.allclose(expected, before, atol=1e-3)
    assert_close(make(), expected, **CLOSE)
    pipeline.fuse_lora(adapter_names=["a"])
    pipeline.unload_lora_weights()
    assert_close(make(), make(with_products(plain, (a, 0.5))), **CLOSE)
