"""Base models whose numbers accelerate keeps elsewhere: everything works as on the same model in memory."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from safetensors.torch import load_file
from tiny_models import CONFIGS, adapted, gpt2, llama, logits, methods, tokens
from torch import nn
from torch.testing import assert_close

from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.placement import OffloadedTensor, offload_hook
from peft.utils.save_and_load import (
    get_base_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

LINEAR = ["q_proj", "v_proj", "down_proj", "lm_head"]
TARGETS = {
    "lora": [*LINEAR, "embed_tokens"],
    "sft": [*LINEAR, "embed_tokens", "input_layernorm"],
    "ssf": [*LINEAR, "embed_tokens"],
}


def to_cpu(model, folder):
    return cpu_offload(model, execution_device="cpu")


def to_disk(model, folder):
    return disk_offload(model, str(folder / "offload"), execution_device="cpu", offload_buffers=True)


def by_device_map(model, folder):
    parts = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    return dispatch_model(model, parts | rest, offload_dir=str(folder / "offload"))


def with_two_hooks(model, folder):
    model = cpu_offload(model, execution_device="cpu")
    for module in model.modules():
        if offload_hook(module) is not None:
            add_hook_to_module(module, AlignDevicesHook(io_same_device=True), append=True)
    return model


OFFLOADS = {"cpu": to_cpu, "disk": to_disk, "device map": by_device_map, "two hooks": with_two_hooks}
offloads = pytest.mark.parametrize("offload", list(OFFLOADS.values()), ids=list(OFFLOADS))


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "offload").iterdir() if path.is_file()}


@methods
@offloads
def test_merging_and_back(method, offload, tmp_path):
    base = llama()
    there = offload(copy.deepcopy(base), tmp_path)
    model = adapted(base, method=method, target_modules=TARGETS[method])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    away = PeftModel.from_pretrained(there, tmp_path / "adapter")
    assert not any(p.is_meta for n, p in away.named_parameters() if f"{method}_" in n)
    ids = tokens()
    expected = logits(model, ids)
    with model.disable_adapter():
        base_logits = logits(model, ids)
    assert not torch.allclose(expected, base_logits, atol=1e-3)
    before = files(tmp_path) if offload in (to_disk, by_device_map) else {}

    assert_close(logits(away, ids), expected)
    model.merge_adapter()
    away.merge_adapter(safe_merge=True)
    layer = away.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.merged and layer.weight.is_meta
    assert_close(logits(away, ids), logits(model, ids))
    assert_close(logits(away, ids), expected, atol=1e-4, rtol=1e-3)
    with away.disable_adapter():
        assert_close(logits(away, ids), base_logits, atol=1e-5, rtol=1e-4)
    away.unmerge_adapter()
    assert_close(logits(away, ids), expected, atol=1e-5, rtol=1e-4)
    if before:
        assert files(tmp_path) == before

    model.unmerge_adapter()
    model = model.merge_and_unload()
    merged = away.merge_and_unload()
    assert_close(logits(merged, ids), logits(model, ids))
    # What was there before is never overwritten: it may be a checkpoint, or serve the next run.
    if before:
        assert before.items() <= files(tmp_path).items()
    if offload is not by_device_map:  # there accelerate itself gives `lm_head` no way back
        remove_hook_from_submodules(merged)
        assert_close(dict(merged.named_parameters()), dict(model.named_parameters()))
    assert here_or_away(merged)


def here_or_away(model) -> bool:
    """Whether every empty parameter has a hook that brings its numbers."""
    return all(
        not p.is_meta or offload_hook(module) is not None
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None
    )


@methods
def test_unload_of_a_merged_model(method, tmp_path):
    base, ids = llama(), tokens()
    expected = logits(base, ids)
    away = adapted(to_disk(base, tmp_path), method=method, target_modules=TARGETS[method])
    before = files(tmp_path)
    away.merge_adapter()
    assert not torch.allclose(logits(away, ids), expected, atol=1e-3)
    plain = away.unload()
    assert torch.equal(logits(plain, ids), expected) and files(tmp_path) == before


def test_a_failed_merge_is_taken_back(tmp_path):
    base, ids = llama(), tokens()
    expected = logits(base, ids)
    away = adapted(to_cpu(base, tmp_path), target_modules=LINEAR)
    layers = list(away.base_model.layers())
    layers[-1].lora_A["default"].weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite; nothing was merged"):
        away.merge_adapter(safe_merge=True)
    layers[-1].fold = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        away.merge_adapter()
    assert not any(layer.merged for layer in layers)
    assert_close(logits(away.unload(), ids), expected)


@methods
@offloads
def test_training_steps(method, offload, tmp_path):
    base = llama()
    there = offload(copy.deepcopy(base), tmp_path)
    base_numbers = get_base_model_state_dict(there)
    assert_close(base_numbers, base.state_dict())
    base_numbers = {name: tensor.clone() for name, tensor in base_numbers.items()}
    model = adapted(base, method=method, target_modules=TARGETS[method])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    away = PeftModel.from_pretrained(there, tmp_path / "adapter", is_trainable=True)
    before = get_peft_model_state_dict(away, save_embedding_layers=False)
    before = {name: tensor.clone() for name, tensor in before.items()}
    batches = [tokens(3) for _ in range(3)]
    for one in (model, away):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for ids in batches:
            one(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = (get_peft_model_state_dict(one, save_embedding_layers=False) for one in (model, away))
    assert_close(found, expected)
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) >= len(TARGETS[method])
    for name, tensor in get_base_model_state_dict(away).items():
        assert torch.equal(tensor, base_numbers[name]), name


@offloads
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_modules_to_save(offload, low_cpu_mem_usage, tmp_path):
    base, ids = llama(), tokens()
    there = offload(copy.deepcopy(base), tmp_path)
    numbers = there.lm_head.weight, base.lm_head.weight.detach().clone()
    away = get_peft_model(there, CONFIGS["lora"](target_modules=["q_proj"], modules_to_save=["lm_head"]))
    own = away.base_model.model.lm_head.modules_to_save["default"]
    assert numbers[0].is_meta and torch.equal(own.weight, numbers[1]) and own.weight.requires_grad
    away(input_ids=ids, labels=ids).loss.backward()
    assert own.weight.grad.abs().sum() > 0
    own.weight.data += torch.randn_like(own.weight)  # a step of the optimiser
    assert torch.equal(get_base_model_state_dict(away)["lm_head.weight"], numbers[1])
    away.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.lm_head.weight"], own.weight)

    expected = logits(away, ids)
    fresh = offload(copy.deepcopy(base), tmp_path)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    again.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_close(logits(again, ids), expected)
    again.set_adapter("second")
    assert_close(logits(again, ids), expected)
    merged = again.merge_and_unload()
    assert_close(logits(merged, ids), expected, atol=1e-4, rtol=1e-3)


@methods
def test_tied_weights_are_parted_and_tied_again(method, tmp_path):
    base, ids = llama(tie_word_embeddings=True), tokens()
    there = to_cpu(copy.deepcopy(base), tmp_path)
    model, away = (adapted(one, method=method, target_modules=["lm_head"]) for one in (base, there))
    set_peft_model_state_dict(away, get_peft_model_state_dict(model, save_embedding_layers=False))
    expected = logits(model, ids)
    plain = get_base_model_state_dict(away)["lm_head.weight"]
    away.merge_adapter()
    assert_close(logits(away, ids), expected, atol=1e-4, rtol=1e-3)
    numbers = get_base_model_state_dict(away)
    assert torch.equal(numbers["model.embed_tokens.weight"], plain)
    assert not torch.equal(numbers["lm_head.weight"], plain)
    away.unmerge_adapter()
    numbers = get_base_model_state_dict(away)
    assert numbers["lm_head.weight"].data_ptr() == numbers["model.embed_tokens.weight"].data_ptr()
    with pytest.warns(UserWarning, match="ties to another"):
        merged = away.merge_and_unload()
    assert_close(logits(merged, ids), expected, atol=1e-4, rtol=1e-3)
    assert merged.config.tie_word_embeddings is False


@offloads
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_embeddings_come_back(offload, low_cpu_mem_usage, tmp_path):
    base, ids = llama(), tokens()
    there = offload(copy.deepcopy(base), tmp_path)
    base.model.embed_tokens.weight.data.normal_()
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    expected = logits(model, ids)
    away = PeftModel.from_pretrained(there, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_close(logits(away, ids), expected)
    tensors = get_peft_model_state_dict(away, save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == saved.keys() and all(torch.equal(tensors[key], saved[key]) for key in saved)


def test_base_state_dict(tmp_path):
    away = adapted(to_disk(llama(), tmp_path))
    other = llama().state_dict()
    set_base_model_state_dict(away, other)
    assert_close(get_base_model_state_dict(away), dict(other))


def test_gpt2(tmp_path):
    """A transposed weight, and one mapping for all modules."""
    base, ids = gpt2(), tokens()
    there = to_cpu(copy.deepcopy(base), tmp_path)
    model, away = (adapted(one, target_modules=["c_attn"]) for one in (base, there))
    set_peft_model_state_dict(away, get_peft_model_state_dict(model))
    away.merge_adapter()
    model.merge_adapter()
    assert_close(logits(away, ids), logits(model, ids))


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@methods
@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
        (lambda: nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
        (lambda: nn.LayerNorm(6), (4, 6)),
        (lambda: nn.RMSNorm(6), (4, 6)),
    ],
    ids=["linear", "conv", "layer norm", "rms norm"],
)
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_kinds_of_layers(method, layer, shape, offload, tmp_path):
    """A bias that merging creates, and norms, whose forward is run with another weight past the hooks."""
    made = layer()
    if method == "lora" and isinstance(made, (nn.LayerNorm, nn.RMSNorm)):
        pytest.skip("LoRA has no layer for norms")
    base, x = Net(made), torch.randn(shape)
    for parameter in base.parameters():
        parameter.data.uniform_(0.5, 1.5)
    there = offload(copy.deepcopy(base), tmp_path)
    extra = {"num_tunable_weights": 4} if method == "sft" else {}
    model, away = (adapted(one, method=method, target_modules=["layer"], **extra) for one in (base, there))
    if method == "ssf" and isinstance(made, nn.RMSNorm):
        model.base_model.model.layer.ssf_shift["default"].data.zero_()
    set_peft_model_state_dict(away, get_peft_model_state_dict(model))
    with torch.no_grad():
        expected = model(x)
        with model.disable_adapter():
            plain = model(x)
        assert not torch.allclose(expected, plain, atol=1e-4)
        assert_close(away(x), expected)
        away.merge_adapter()
        assert_close(away(x), expected, atol=1e-4, rtol=1e-4)
        away.unmerge_adapter()
        assert_close(away(x), expected, atol=1e-4, rtol=1e-4)
        assert isinstance(made.bias if hasattr(made, "bias") else None, nn.Parameter) == (
            getattr(away.base_model.model.layer.base_layer, "bias", None) is not None
        )
        merged = away.merge_and_unload()
        assert_close(merged(x), expected, atol=1e-4, rtol=1e-4)
        remove_hook_from_submodules(merged)
        assert not any(p.is_meta for p in merged.parameters())
        assert_close(merged(x), expected, atol=1e-4, rtol=1e-4)


def test_no_place_to_write_to(tmp_path):
    """A checkpoint's own file is never written to; without a folder there is no place for other numbers."""
    base = llama()
    base.save_pretrained(tmp_path / "model")
    file = str(tmp_path / "model" / "model.safetensors")
    index = {name: {"safetensors_file": file, "weight_name": name, "dtype": "float32"} for name in load_file(file)}
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    ids = tokens()
    expected = logits(base, ids)
    (tmp_path / "offload").mkdir()
    for folder in (None, str(tmp_path / "offload")):
        there = dispatch_model(copy.deepcopy(base), {"": "disk"}, offload_dir=folder, offload_index=index)
        away = adapted(there)
        if folder is None:
            with pytest.raises(RuntimeError, match="offload_dir"):
                away.merge_adapter()
            assert not any(layer.merged for layer in away.base_model.layers())
            assert_close(logits(away.unload(), ids), expected)
        else:
            adapted_logits = logits(away, ids)
            away.merge_adapter()
            assert_close(logits(away, ids), adapted_logits, atol=1e-4, rtol=1e-3)
            assert all(OffloadedTensor(layer.get_base_layer(), "weight").on_disk for layer in away.base_model.layers())
            away.unmerge_adapter()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == content


def test_empty_models_without_hooks():
    with torch.device("meta"):
        base = llama()
    model = get_peft_model(base, CONFIGS["lora"](target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="no accelerate hook"):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match="no accelerate hook"):
        get_peft_model_state_dict(model)
    full = get_peft_model_state_dict(adapted(llama(), target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="low_cpu_mem_usage=True"):
        set_peft_model_state_dict(model, full)


# Sharded parameters


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    base = model.get_base_model()
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh)
    return model


def check_fsdp2(method, folder):
    """Everything on a model sharded by `fully_shard`, against a copy that is not; in every process of a group."""
    base, ids = llama(), tokens(4)
    targets = [*LINEAR, "input_layernorm"] if method == "sft" else LINEAR
    model = adapted(copy.deepcopy(base), method=method, target_modules=targets)
    away = shard(copy.deepcopy(model))
    layer = away.base_model.model.model.layers[0].mlp.down_proj
    assert type(layer.weight).__name__ == "DTensor"
    expected = logits(model, ids)
    assert_close(logits(away, ids), expected)

    model.merge_adapter()
    away.merge_adapter(safe_merge=True)
    assert type(layer.weight).__name__ == "DTensor"
    assert_close(logits(away, ids), logits(model, ids))
    with away.disable_adapter():
        assert_close(logits(away, ids), logits(base, ids), atol=1e-4, rtol=1e-3)
    assert_close(logits(away, ids), logits(model, ids))
    away.unmerge_adapter()
    model.unmerge_adapter()
    assert_close(logits(away, ids), expected, atol=1e-4, rtol=1e-3)

    rank = torch.distributed.get_rank()
    tensors = get_peft_model_state_dict(model, save_embedding_layers=True)
    away.save_pretrained(folder, save_embedding_layers=True, is_main_process=rank == 0)
    torch.distributed.barrier()
    saved = load_file(folder / "adapter_model.safetensors")
    assert_close(saved, tensors, atol=1e-5, rtol=1e-4)
    other = {key: t + 0.1 if t.is_floating_point() and method in key else t for key, t in tensors.items()}
    for one in (model, away):
        assert not any(set_peft_model_state_dict(one, other))
    assert not torch.allclose(logits(model, ids), expected, atol=1e-3)
    assert_close(logits(away, ids), logits(model, ids), atol=1e-4, rtol=1e-3)
    assert_close(logits(away.merge_and_unload(), ids), logits(model, ids), atol=1e-4, rtol=1e-3)


@methods
def test_fsdp2(method, one_process, tmp_path):
    check_fsdp2(method, tmp_path / "adapter")


def _fsdp2_worker(rank, folder, seed):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for method in CONFIGS:
        torch.manual_seed(seed)
        check_fsdp2(method, folder / method)
    for use_orig_params in (True, False):
        check_fsdp1(use_orig_params, "FSDP1")
    torch.distributed.destroy_process_group()


def test_fsdp2_in_two_processes(tmp_path, seed):
    # Forked: a fresh interpreter would take longer to import everything than the test itself.
    torch.multiprocessing.start_processes(_fsdp2_worker, (tmp_path, seed), nprocs=2, start_method="fork")


class FakeZero:
    """What peft uses of DeepSpeed's ZeRO-3, by its documentation.

    A partitioned parameter is empty, knows its `ds_id` and `ds_shape`, and is whole within `GatheredParameters`; at its
    end what the process `modifier_rank` wrote is kept, and without one nothing is.
    """

    def __init__(self):
        self.numbers: dict[int, torch.Tensor] = {}

    def partition(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.ds_id, parameter.ds_shape = len(self.numbers), parameter.shape
                parameter.ds_numel = parameter.numel()
                self.numbers[parameter.ds_id] = parameter.data
                parameter.data = parameter.data.new_empty(0)

    def GatheredParameters(self, params, modifier_rank=None):
        fake = self

        class Context:
            def __enter__(self):
                for parameter in params:
                    assert parameter.numel() == 0
                    parameter.data = fake.numbers[parameter.ds_id].clone()

            def __exit__(self, *exc):
                for parameter in params:
                    if modifier_rank is not None:
                        fake.numbers[parameter.ds_id] = parameter.data.clone()
                    # The gathered memory is used for something else.
                    parameter.data.fill_(float("nan") if parameter.is_floating_point() else -1)
                    parameter.data = parameter.data.new_empty(0)

        return Context()

    def whole(self, model: nn.Module) -> nn.Module:
        """A plain copy of a partitioned model."""
        plain = copy.deepcopy(model)
        for (_, parameter), (_, original) in zip(plain.named_parameters(), model.named_parameters()):
            if hasattr(original, "ds_id"):
                parameter.data = self.numbers[original.ds_id].clone()
        return plain


@pytest.fixture
def zero(monkeypatch):
    fake = FakeZero()
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=fake))
    return fake


@methods
def test_zero3(method, zero, tmp_path):
    base, ids = llama(), tokens()
    away = copy.deepcopy(base)
    zero.partition(away)
    # Put on the partitioned model: the sizes are those of the whole weights.
    config = CONFIGS[method](target_modules=LINEAR, modules_to_save=["norm"])
    away = get_peft_model(away, copy.deepcopy(config))
    norm = away.base_model.model.model.norm.modules_to_save["default"]
    assert torch.equal(norm.weight, base.model.norm.weight)
    reference = adapted(base, method=method, target_modules=LINEAR, modules_to_save=["norm"])
    tensors = get_peft_model_state_dict(reference, save_embedding_layers=False)
    zero.partition(away)  # the adapter too
    assert not any(set_peft_model_state_dict(away, tensors))
    found = get_peft_model_state_dict(away, save_embedding_layers=False)
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    away.save_pretrained(tmp_path, save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.model.embed_tokens.weight"], base.model.embed_tokens.weight)

    expected = logits(reference, ids)
    assert_close(logits(zero.whole(away), ids), expected)
    away.merge_adapter(safe_merge=True)
    assert all(layer.weight.numel() == 0 for layer in away.base_model.layers())
    assert_close(logits(zero.whole(away), ids), expected, atol=1e-4, rtol=1e-3)
    away.unmerge_adapter()
    assert_close(logits(zero.whole(away), ids), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(use_orig_params, one_process):
    with pytest.warns(UserWarning, match="NO_SHARD"):
        check_fsdp1(use_orig_params, "FSDP1|computed from other parameters")


def check_fsdp1(use_orig_params, message):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted(Net(nn.Linear(6, 5)), target_modules=["layer"])
    model.requires_grad_(False)  # without use_orig_params all of it has to be alike
    cpu = torch.device("cpu")
    FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=cpu)
    with pytest.raises(RuntimeError, match=message):
        model.merge_adapter()
    assert not any(layer.merged for layer in model.base_model.layers())


def test_computed_weights_are_refused():
    """What is written into them would be lost at the next forward."""
    base, x = Net(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))), torch.randn(3, 6)
    model = adapted(base, target_modules=["layer"])
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(RuntimeError, match="computed from other parameters"):
            model.merge_adapter()
        assert torch.equal(model(x), expected)
        layer = model.base_model.model.layer.base_layer
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        layer.weight = nn.Parameter(layer.weight)
        assert_close(model.merge_and_unload()(x), expected)


def test_biases_of_an_off_loaded_model_are_not_trained(tmp_path):
    base = to_cpu(gpt2(), tmp_path)
    for bias in ("all", "lora_only"):
        with pytest.raises(ValueError, match="which is off-loaded: use bias='none'"):
            get_peft_model(base, CONFIGS["lora"](target_modules=["c_attn"], bias=bias))
    assert not any("lora" in name for name, _ in base.named_modules())


@methods
def test_base_tensors_made_in_inference_mode(method):
    """torch lets nobody write into them; merging replaces them."""
    with torch.inference_mode():
        base = llama()
    plain = llama()
    plain.load_state_dict(base.state_dict())
    ids = tokens()
    model, reference = (adapted(one, method=method, target_modules=LINEAR) for one in (base, plain))
    set_peft_model_state_dict(model, get_peft_model_state_dict(reference, save_embedding_layers=False))
    expected = logits(reference, ids)
    assert_close(logits(model, ids), expected)
    with torch.inference_mode():
        assert_close(model(input_ids=ids).logits, expected)
    with model.disable_adapter(), reference.disable_adapter():
        assert_close(logits(model, ids), logits(reference, ids))
    model.merge_adapter()
    assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-3)
    model.unmerge_adapter()
    assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-3)
    # Where a gradient goes through such a tensor, torch itself says what to do.
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(input_ids=ids, labels=ids).loss.backward()
