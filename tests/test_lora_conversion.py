"""Adapters of other methods as LoRAs: what they compute, what the rank costs, and what cannot be converted."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import bert, llama, logits, tokens
from torch import nn

from peft import LoraConfig, PeftModel, SftConfig, SsfConfig, convert_to_lora, get_peft_model, save_as_lora
from peft.tuners.lora.conversion import LoraConversion
from peft.tuners.tuners_utils import BaseTunerLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv, self.linear = nn.Embedding(7, 6), nn.Conv1d(6, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, ids):
        return self.linear(self.conv(self.table(ids).mT).mT)


ALL = ["table", "conv", "linear"]
CONFIGS = {
    "sft": SftConfig(target_modules=ALL, density=0.4, selection_algorithm="static"),
    "sft_row": SftConfig(target_modules=ALL, density=0.4, granularity="row"),
    "dora": LoraConfig(target_modules=ALL, use_dora=True, r=2),
    "ssf": SsfConfig(target_modules=["conv", "linear"]),
}


def randomised(base: nn.Module, config) -> PeftModel:
    model = get_peft_model(base, copy.deepcopy(config))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for _, parameter in layer.adapter_tensors("default"):
                if parameter.is_floating_point():
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore:Adapter 'default' is a LoRA already")
@pytest.mark.parametrize("method", CONFIGS)
def test_at_full_rank_the_lora_is_the_adapter(method, tmp_path):
    base, ids = Net(), torch.arange(7).view(1, 7)
    fresh = copy.deepcopy(base)
    model = randomised(base, CONFIGS[method])
    expected, before = model(ids), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    errors = save_as_lora(tmp_path, model, rank=7)
    assert max(errors.values()) < 1e-3
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    lora = PeftModel.from_pretrained(fresh, tmp_path)
    assert type(lora.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(lora(ids), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lora.merge_and_unload()(ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 0.5, 0.9, 1.0])
def test_the_lora_is_the_best_of_its_rank_and_says_what_it_misses(rank):
    model = randomised(Net(), CONFIGS["sft"])
    conversion = convert_to_lora(model, rank)
    assert isinstance(conversion, LoraConversion)
    config, tensors = conversion
    for key in ALL:
        layer, path = getattr(model.get_base_model(), key), f"base_model.model.{key}"
        D = layer.folded(["default"])[0] - layer.op.load()[0]
        name = "lora_embedding_{}" if key == "table" else "lora_{}.weight"
        A, B = (tensors[f"{path}.{name.format(letter)}"].flatten(1).double() for letter in "AB")
        S = torch.linalg.svdvals(D.detach().double().flatten(1))
        share = S.square().cumsum(0) / S.square().sum()
        r = min(rank, len(S)) if isinstance(rank, int) else min(int((share < rank - 1e-9).sum()) + 1, len(S))
        assert len(A) == r == B.shape[1]
        missed = (D.double().flatten(1) - B @ A).norm() / D.double().norm()
        expected = (1 - share[r - 1]).clamp(min=0).sqrt().item()
        assert missed.item() == pytest.approx(expected, abs=1e-5)  # the factors are float32
        assert conversion.errors[path] == pytest.approx(missed.item(), abs=1e-4)


def test_heads_and_targets_come_along(tmp_path):
    base = bert()
    fresh, ids = copy.deepcopy(base), tokens()
    config = SftConfig(task_type="SEQ_CLS", target_modules=["query"], layers_to_transform=[1], num_tunable_weights=60)
    model = randomised(base, config)
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    errors = save_as_lora(tmp_path, model, rank=16)
    assert list(errors) == ["base_model.model.bert.encoder.layer.1.attention.self.query"]
    lora = PeftModel.from_pretrained(fresh, tmp_path)
    assert lora.peft_config["default"].task_type == "SEQ_CLS" and lora.peft_config["default"].layers_to_transform == [1]
    torch.testing.assert_close(logits(lora, ids), logits(model.eval(), ids), atol=1e-5, rtol=1e-4)


def test_layers_with_ranks_of_their_own_load_again(tmp_path):
    base, ids = llama(), tokens()
    fresh = copy.deepcopy(base)
    counts = {"self_attn.q_proj": 3, "mlp.down_proj": 60}  # ranks of 3 and of more
    counts = {f"model.layers.{n}.{name}": count for n in (0, 1) for name, count in counts.items()}
    model = randomised(base, SftConfig(num_deltas=counts))
    save_as_lora(tmp_path, model, rank=0.999999)
    lora = PeftModel.from_pretrained(fresh, tmp_path)
    assert lora.peft_config["default"].rank_pattern
    torch.testing.assert_close(logits(lora, ids), logits(model, ids), atol=5e-3, rtol=1e-2)


def test_what_cannot_be_converted_is_refused():
    model = randomised(Net(), CONFIGS["sft"])
    for rank in (0, -1, 0.0, 1.5, True):
        with pytest.raises(ValueError, match=f"positive whole number, or a fraction .* got {rank}"):
            convert_to_lora(model, rank)
    with pytest.raises(ValueError, match="no layer with an adapter 'b'"):
        convert_to_lora(model, 2, adapter_name="b")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged: call unmerge_adapter"):
        convert_to_lora(model, 2)
    norm = get_peft_model(nn.Sequential(nn.LayerNorm(4)), SsfConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"0 \(SsfLayer on LayerNorm\) cannot be a LoRA"):
        convert_to_lora(norm, 2)
    assert not norm.supports_lora_conversion() and model.supports_lora_conversion()
    both = randomised(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), SsfConfig(target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="changes biases, which needs lora_bias=True, and embeddings"):
        convert_to_lora(both, 2)


def test_a_lora_of_another_rank_is_warned_of():
    model = randomised(Net(), LoraConfig(target_modules=["linear"], r=4))
    with pytest.warns(UserWarning, match="is a LoRA already"):
        config, tensors = convert_to_lora(model, 2)
    assert config.r == 2 and tensors["base_model.model.linear.lora_A.weight"].shape == (2, 4)
