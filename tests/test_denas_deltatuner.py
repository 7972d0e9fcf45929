"""DE-NAS as users call it: deltatuner's `optimize` on its eight architectures, and `get_peft_model` with a search."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import transformers as tr
from tiny_models import SIZES, bert, llama, losses_of_training, make_tokenizer

import peft
from peft import CompactLoraConfig, DenasConfig, LoraConfig, PeftConfig, PeftModel, SftConfig, get_peft_model
from peft.deltatuner import deltatuner, deltatuner_args
from peft.tuners.denas import read_structure
from peft.utils.warning import PeftWarning

VOCABULARY = len(make_tokenizer())
COMMON = SIZES | {"vocab_size": VOCABULARY}
GPT = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
ARCHITECTURES = {
    "gpt2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(**GPT)),
    "gptj": lambda: tr.GPTJForCausalLM(tr.GPTJConfig(**GPT, rotary_dim=4)),
    "bloom": lambda: tr.BloomForCausalLM(
        tr.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=3, n_head=2)
    ),
    "opt": lambda: tr.OPTForCausalLM(
        tr.OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)
    ),
    "gpt_neo": lambda: tr.GPTNeoForCausalLM(
        tr.GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=32,
            attention_types=[[["global", "local"], 1]],
        )
    ),
    "falcon": lambda: tr.FalconForCausalLM(tr.FalconConfig(**COMMON)),
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**COMMON, intermediate_size=24)),
    "mpt": lambda: tr.MptForCausalLM(
        tr.MptConfig(d_model=16, n_heads=2, n_layers=3, vocab_size=VOCABULARY, max_seq_len=64)
    ),
}  # fmt: skip
QUICK = {
    "max_epochs": 2, "population_num": 6, "select_num": 4, "crossover_num": 2, "mutation_num": 2, "img_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def train(model, steps: int = 3) -> list[float]:
    """The losses before the steps, without dropout: its noise is larger than what so few steps gain."""
    model.eval()
    ids = torch.randint(4, VOCABULARY, (2, 12))
    return losses_of_training(model, ids, steps, lr=1e-2)


@pytest.mark.parametrize("algo", ["lora", "ssf"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matrix(name, algo, tokenizer, tmp_path):
    """Searched, trained, saved, loaded, merged."""
    base = ARCHITECTURES[name]()
    plain = copy.deepcopy(base).eval()
    start = get_peft_model(base, LoraConfig()) if algo == "lora" else base
    limit = start.get_nb_trainable_parameters()[0] if algo == "lora" else 400
    options = QUICK if algo == "lora" else QUICK | {"max_param_limits": limit / 1e6}
    model = deltatuner.optimize(start, tokenizer, algo=algo, progress=False, **options)
    structure = model.peft_config["default"].structure
    layers = plain.config.num_hidden_layers
    assert len(structure["num_hidden_layers"]) == layers
    adapted = {
        int(next(part for part in key.split(".") if part.isdigit())) for key in model.base_model.targeted_module_names
    }
    assert adapted == {i for i in range(layers) if structure["num_hidden_layers"][i]}
    trained = model.get_nb_trainable_parameters()[0]
    assert 0 < trained <= limit
    losses = train(model)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    assert read_structure(tmp_path) == structure
    ids = torch.randint(4, VOCABULARY, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-6)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
        assert not torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-4)
    again = deltatuner.optimize(plain, algo=algo, best_model_structure=str(tmp_path / "best_model_structure.txt"))
    assert again.get_nb_trainable_parameters()[0] == trained


def test_readme_example(tokenizer):
    """deltatuner's, with a search of usual size; nothing but the import is different."""
    model = ARCHITECTURES["mpt"]()
    config = LoraConfig()
    lora_model = get_peft_model(model, config)
    deltatuning_args = deltatuner_args.DeltaTunerArguments()
    deltatuning_args.max_epochs = 1
    deltatuner_model = deltatuner.optimize(
        model=lora_model, tokenizer=tokenizer, deltatuning_args=deltatuning_args, progress=False
    )
    structure = deltatuner_model.peft_config["default"].structure
    assert set(structure) == {"num_hidden_layers", "r", "alpha"}  # auto: the model has LoRA
    assert peft.deltatuner.optimize is deltatuner.optimize
    assert peft.deltatuner.DeltaTunerArguments is deltatuner_args.DeltaTunerArguments


def test_arguments_have_deltatuners_names_and_defaults():
    expected = dict(
        batch_size=4, max_epochs=10, scale_factor=10, select_num=50, population_num=50, m_prob=0.2, s_prob=0.4,
        crossover_num=25, mutation_num=25, img_size=32, expressivity_weight=0, complexity_weight=0, diversity_weight=1,
        saliency_weight=1, latency_weight=0, max_param_limits=None, min_param_limits=None, budget_latency_max=None,
        budget_latency_min=None, layer_name="num_hidden_layers", best_model_structure=None, random_seed=12345,
        denas=True, ssf_target_module=None, task_type="CAUSAL_LM", algo="auto",
    )  # fmt: skip
    args = deltatuner_args.DeltaTunerArguments()
    assert {name: getattr(args, name) for name in expected} == expected
    names = {field.name for field in dataclasses.fields(args)}
    assert {"search_engine", "model_id", "search_space_name"} <= names
    (parsed,) = tr.HfArgumentParser(deltatuner_args.DeltaTunerArguments).parse_args_into_dataclasses(
        ["--algo", "ssf", "--max_param_limits", "0.5"]
    )
    assert (parsed.algo, parsed.max_param_limits) == ("ssf", 0.5)


def test_auto_is_ssf_without_lora(tokenizer):
    model = deltatuner.optimize(ARCHITECTURES["llama"](), tokenizer, progress=False, **QUICK)
    assert model.peft_config["default"].peft_type == "SSF"


def test_auto_is_lora_whatever_the_models_lora_is_called(tokenizer):
    model = get_peft_model(ARCHITECTURES["llama"](), LoraConfig(r=2), "mine")
    model = deltatuner.optimize(model, tokenizer, search_engine="exact", progress=False)
    assert {name: config.peft_type for name, config in model.peft_config.items()} == {"default": "LORA"}


def test_sft_with_a_share_for_each_layer(tokenizer, tmp_path):
    base = ARCHITECTURES["llama"]()
    model = deltatuner.optimize(base, tokenizer, algo="sft", search_engine="exact", progress=False, img_size=16)
    structure = model.peft_config["default"].structure
    assert set(structure) == {"num_hidden_layers", "share"}
    model.save_pretrained(tmp_path)
    assert read_structure(tmp_path) == structure
    assert PeftConfig.from_pretrained(tmp_path).num_deltas == model.peft_config["default"].num_deltas


def test_own_settings_of_the_lora_are_kept(tokenizer):
    config = LoraConfig(r=4, target_modules=["k_proj", "up_proj"], lora_dropout=0.1, use_rslora=True, task_type=None)
    lora = get_peft_model(ARCHITECTURES["llama"](), config, "mine")
    limit = lora.get_nb_trainable_parameters()[0]
    model = deltatuner.optimize(lora, tokenizer, "mine", model_id="some/base", progress=False, **QUICK)
    made = model.peft_config["mine"]
    assert (made.lora_dropout, made.use_rslora, made.task_type) == (0.1, True, "CAUSAL_LM")
    assert made.base_model_name_or_path == "some/base"
    assert {key.rpartition(".")[2] for key in made.target_modules} <= {"k_proj", "up_proj"}
    assert model.get_nb_trainable_parameters()[0] <= limit


def test_without_a_search():
    lora = get_peft_model(ARCHITECTURES["llama"](), LoraConfig())
    assert deltatuner.optimize(lora, denas=False) is lora
    ssf = deltatuner.optimize(ARCHITECTURES["llama"](), denas=False, ssf_target_module=["q_proj"])
    assert {key.rpartition(".")[2] for key in ssf.base_model.targeted_module_names} == {"q_proj"}
    assert ssf.peft_config["default"].structure is None


def test_wrong_input(tokenizer):
    base = ARCHITECTURES["llama"]()
    with pytest.raises(ValueError, match="needs the `tokenizer`"):
        deltatuner.optimize(base)
    with pytest.raises(TypeError, match=r"unknown arguments \['epochs'\]"):
        deltatuner.optimize(base, tokenizer, epochs=3)
    with pytest.raises(ValueError, match="algo must be one of"):
        deltatuner.optimize(base, tokenizer, algo="adalora")
    with pytest.raises(ValueError, match="SigOpt's service is closed"):
        deltatuner.optimize(base, tokenizer, search_engine="SigoptSearchEngine")
    with pytest.raises(ValueError, match="less than the smallest structure needs"):
        deltatuner.optimize(base, tokenizer, algo="lora", max_param_limits=1e-5)
    with pytest.raises(ValueError, match="has 3 entries, but the model has 2 layers"):
        deltatuner.optimize(base, algo="ssf", best_model_structure={"num_hidden_layers": [1, 0, 1]})
    with pytest.raises(ValueError, match="ssf_target_module has no meaning with algo='lora'"):
        deltatuner.optimize(base, tokenizer, algo="lora", ssf_target_module=["q_proj"])
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in base.modules())
    lora = get_peft_model(base, LoraConfig())
    with pytest.raises(ValueError, match="needs the `tokenizer`"):
        deltatuner.optimize(lora)
    assert isinstance(lora.get_base_model().model.layers[0].self_attn.q_proj, peft.tuners.lora.Linear)
    train(lora)
    with pytest.warns(PeftWarning, match="has been trained; the compact one replaces it"):
        deltatuner.optimize(lora, tokenizer, progress=False, **QUICK)


# ---- get_peft_model ----


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_compact_lora_with_a_search(tokenizer, tmp_path, granularity):
    base = ARCHITECTURES["llama"]()
    config = CompactLoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", search=DenasConfig(granularity=granularity)
    )
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear"))
    model = get_peft_model(base, config, tokenizer=tokenizer)
    trained, uniform = (m.get_nb_trainable_parameters()[0] for m in (model, plain))
    assert uniform - 40 < trained <= uniform  # one more rank of the smallest module would be 32 to 40
    assert config.result.params == trained and config.result.structure == model.peft_config["default"].structure
    for layer in model.base_model.layers():
        assert layer.scaling["default"] == 2  # lora_alpha / r, as configured
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_configuration_before_the_search_round_trips(tmp_path):
    config = CompactLoraConfig(r=4, search=DenasConfig(score="deltatuner", r_max=6, max_params=0.01))
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is CompactLoraConfig and loaded.search == config.search and loaded.r == 4


def test_search_needs_examples(tokenizer):
    with pytest.raises(ValueError, match="give a `batch` .* or the `tokenizer`"):
        get_peft_model(llama(), CompactLoraConfig())
    with pytest.raises(TypeError, match="not for SftConfig"):
        get_peft_model(llama(), SftConfig(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="exclude each other"):
        CompactLoraConfig(best_structure={}, search=DenasConfig())
    with pytest.raises(ValueError, match="rank_pattern is what the structure decides"):
        CompactLoraConfig(rank_pattern={"q_proj": 3})


def test_classifier_from_a_batch():
    batch = {"input_ids": torch.randint(3, 50, (4, 6)), "labels": torch.tensor([0, 1, 2, 1])}
    model = get_peft_model(bert(), CompactLoraConfig(task_type="SEQ_CLS"), batch=batch)
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    assert any(".classifier." in name and p.requires_grad for name, p in model.named_parameters())
