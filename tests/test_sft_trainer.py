"""SftTrainer on the real 🤗 Trainer: what it makes, what it refuses, and that a resumed run is the same run."""

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sft_runs import assert_same
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from peft import (
    LoraConfig,
    PeftModel,
    PeftWarning,
    SftAdamW,
    SftConfig,
    SftSelector,
    SftSM3,
    SftTrainer,
    get_peft_model,
)

STEPS = 12


class OrderedTrainer(Trainer):
    """Takes the data in the order in which they are."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, self.args.per_device_train_batch_size, collate_fn=self.data_collator
        )


class OwnTrainer(SftTrainer(OrderedTrainer)):
    """A user's subclass of what SftTrainer makes."""


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small a second thread costs more than it saves, and a lot more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base_model():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def data():
    rows = torch.randint(32, (40, 6))
    return [{"input_ids": row, "labels": row} for row in rows]


def adapt(base_model, algorithm="rigl", **settings):
    config = SftConfig(
        task_type="CAUSAL_LM",
        density=0.2,
        selection_algorithm=algorithm,
        reselection_steps=5,
        selection_accumulation_steps=3,
        **settings,
    )
    return get_peft_model(copy.deepcopy(base_model), config)


def arguments(folder, **settings):
    settings = {"gradient_accumulation_steps": 2, "learning_rate": 0.02, "save_steps": 1, **settings}
    return TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def adapter_state(model):
    return {name: tensor.clone() for name, tensor in model.named_parameters() if "sft_delta" in name}


# ---- The class ----


def test_the_class_is_named_cached_and_a_subclass():
    cls = SftTrainer(OrderedTrainer)
    assert cls.__name__ == cls.__qualname__ == "SftOrderedTrainer"
    assert issubclass(cls, OrderedTrainer)
    assert SftTrainer(OrderedTrainer) is cls
    assert SftTrainer(cls) is cls
    assert SftTrainer(OwnTrainer) is OwnTrainer
    assert SftTrainer(Trainer) is not cls
    with pytest.raises(TypeError, match="SftTrainer takes transformers.Trainer or a subclass of it, got <class 'int'>"):
        SftTrainer(int)


@pytest.mark.parametrize("cls", [SftTrainer(Trainer), SftTrainer(OrderedTrainer), OwnTrainer])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_class_can_be_pickled(cls, protocol):
    assert pickle.loads(pickle.dumps(cls, protocol)) is cls
    assert pickle._loads(pickle._dumps(cls, protocol)) is cls  # the implementation in Python, which dill builds on
    assert copy.deepcopy(cls) is cls


def test_the_class_can_be_pickled_under_another_metaclass():
    meta = type("Meta", (type,), {})
    base = meta("MetaTrainer", (Trainer,), {"__module__": __name__, "__qualname__": "MetaTrainer"})
    globals()["MetaTrainer"] = base
    cls = SftTrainer(base)
    assert isinstance(cls, meta)
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_the_modules_load_without_transformers():
    code = "import sys, peft.tuners.sft.trainer; assert not {'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Training ----


@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_equals_the_custom_loop(algorithm, base_model, data, tmp_path):
    """The loop of the documentation and the trainer, given the same batches, end with the same weights."""
    for module in base_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model = adapt(base_model.double(), algorithm, dtype="auto")
    other = copy.deepcopy(model)
    args = arguments(
        tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.1, adam_beta1=0.9, save_strategy="no"
    )
    trainer = SftTrainer(OrderedTrainer)(model=model, args=args, train_dataset=data)
    trainer.train()

    config = other.peft_config["default"]
    groups = [{"params": [p for p in other.parameters() if p.requires_grad], "weight_decay": 0.1}]
    if algorithm == "sm3":
        deltas = {delta.values: delta for _, _, delta in other.active_deltas()}
        optimizer = SftSM3(groups, deltas, lr=0.02)
    else:
        optimizer = SftAdamW(groups, lr=0.02, eps=1e-8, momentum_dtype=torch.float32)
    selector = SftSelector(other, optimizer, config, STEPS, 2)
    other.train()
    batches = [torch.stack([row["input_ids"] for row in data[n : n + 3]]) for n in range(0, 40, 3)]
    epochs = 2 * [batches]  # 14 batches, 7 update steps an epoch
    for step, batch in enumerate([batch for epoch in epochs for batch in epoch][: 2 * STEPS]):
        pair = batches[step % 14 // 2 * 2 : step % 14 // 2 * 2 + 2]
        count = 5 * sum(len(each) for each in pair)  # the Trainer takes the mean over all tokens of a step
        other(input_ids=batch, labels=batch, num_items_in_batch=count).loss.backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
            selector.step()
    assert selector.history == trainer.sft_selector.history and len(selector.history) == 2
    ours, theirs = adapter_state(model), adapter_state(other)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def test_a_loss_of_ones_own_with_clipping_and_a_dense_module(base_model, data, tmp_path):
    """A Trainer with its own `compute_loss`, gradients clipped, a module trained whole: against a loop with torch's
    AdamW for that module."""

    class Peaky(OrderedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"]).logits.logsumexp(-1).square().mean() / 2

    base_model.model.layers[0].self_attn.attention_dropout = 0.0
    model = adapt(base_model.double(), dtype="auto", modules_to_save=["lm_head"])
    other = copy.deepcopy(model)
    settings = {"max_grad_norm": 0.05, "weight_decay": 0.1, "lr_scheduler_type": "constant", "save_strategy": "no"}
    args = arguments(tmp_path, adam_epsilon=1e-14, **settings)  # torch adds epsilon at another place
    trainer = SftTrainer(Peaky)(model=model, args=args, train_dataset=data)
    trainer.train()

    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    (head,) = (name for name in trained if "lm_head" in name)
    values = [p for name, p in trained.items() if name != head]
    dense = torch.optim.AdamW([trained[head]], lr=0.02, eps=1e-14, weight_decay=0.1)
    sparse = SftAdamW(values, lr=0.02, eps=1e-14, weight_decay=0.1, momentum_dtype=torch.float32)
    selector = SftSelector(other, sparse, other.peft_config["default"], STEPS, 2)
    other.train()
    batches = [torch.stack([row["input_ids"] for row in data[n : n + 3]]) for n in range(0, 40, 3)]
    for step, batch in enumerate((2 * batches)[: 2 * STEPS]):
        (other(input_ids=batch).logits.logsumexp(-1).square().mean() / 2).backward()
        if step % 2:
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.05)
            assert norm > 0.05
            for each in (dense, sparse):
                each.step()
                each.zero_grad()
            selector.step()
    assert selector.history == trainer.sft_selector.history
    for name, tensor in adapter_state(model).items():
        torch.testing.assert_close(tensor, adapter_state(other)[name], rtol=1e-3, atol=1e-5)
    moved = model.get_parameter(head) - model.get_base_model().lm_head.original_module.weight
    expected = trained[head] - other.get_base_model().lm_head.original_module.weight
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


def test_seq2seq(data, tmp_path):
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    settings = {"reselection_steps": 5, "selection_accumulation_steps": 3}
    model = get_peft_model(base, SftConfig(task_type="SEQ_2_SEQ_LM", density=0.2, **settings))
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        learning_rate=0.05,
        predict_with_generate=True,
        generation_max_length=5,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [row | {"labels": data[0]["labels"]} for row in data]  # one answer to everything is learned for certain
    trainer = SftTrainer(Seq2SeqTrainer)(model=model, args=args, train_dataset=data, eval_dataset=data[:6])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    assert [entry["step"] for entry in trainer.sft_selector.history] == [3, 8]
    assert trainer.predict(data[:6]).predictions.shape[0] == 6


@pytest.mark.parametrize("algorithm, stops", [("rigl", [1, 3, 5, 7, 9]), ("sm3", [2, 5])])
def test_resuming_is_exact(algorithm, stops, base_model, data, tmp_path):
    model = adapt(base_model, algorithm, modules_to_save=["lm_head"])
    others = [copy.deepcopy(model) for _ in stops]
    trainer = SftTrainer(Trainer)(model=model, args=arguments(tmp_path / "a"), train_dataset=data)
    trainer.train()
    expected = adapter_state(model)
    assert trainer.sft_selector.history[0]["moved"] > 0
    for stop, other in zip(stops, others):
        with torch.no_grad():
            for _, _, delta in other.active_deltas():  # nothing of the start may survive
                delta.indices.copy_(torch.randperm(delta.dense_numel)[: delta.indices.numel()].sort().values)
        args = arguments(tmp_path / "b", save_strategy="no")
        resumed = SftTrainer(Trainer)(model=other, args=args, train_dataset=data)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
        assert_same(expected, adapter_state(other))
        head = "base_model.model.lm_head.modules_to_save.default.weight"
        assert torch.equal(model.get_parameter(head), other.get_parameter(head))


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["bf16", "reentrant checkpointing", "checkpointing", "best model"],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_resuming_is_exact_under(settings, base_model, data, tmp_path):
    """Stopped in a gathering window; checkpointing gives the plain run's weights besides, autocast does not."""
    model = adapt(base_model)
    other, plain = copy.deepcopy(model), copy.deepcopy(model)
    more = {"train_dataset": data, "eval_dataset": data[:6]}
    settings = {"save_steps": 3, **settings}
    SftTrainer(Trainer)(model=model, args=arguments(tmp_path, **settings), **more).train()
    resumed = SftTrainer(Trainer)(model=other, args=arguments(tmp_path, **settings), **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(adapter_state(model), adapter_state(other))
    SftTrainer(Trainer)(model=plain, args=arguments(tmp_path, save_strategy="no"), **more).train()
    same = all(torch.equal(tensor, adapter_state(model)[name]) for name, tensor in adapter_state(plain).items())
    if "bf16" in settings:
        assert not same
    elif "gradient_checkpointing" in settings:
        assert same


def test_a_trainer_can_train_again(base_model, data, tmp_path):
    """The optimiser is kept between two runs, so the adapter must be loaded into the parameters that it holds."""
    model = adapt(base_model)
    trainer = SftTrainer(Trainer)(model=model, args=arguments(tmp_path), train_dataset=data)
    trainer.train()
    expected = adapter_state(model)
    first = trainer.sft_selector
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(expected, adapter_state(model))
    assert trainer.sft_selector is not first
    assert not any(delta.is_gathering for delta in first.deltas.values())


def test_the_checkpoint_holds_the_selector(base_model, data, tmp_path):
    trainer = SftTrainer(Trainer)(model=adapt(base_model), args=arguments(tmp_path), train_dataset=data)
    trainer.train()
    names = set(trainer.sft_selector.deltas)
    for step, updates in ((1, 1), (2, 2), (3, None), (5, None), (6, 1)):
        state = load_file(tmp_path / f"checkpoint-{step}" / "sft_selector.safetensors")
        assert state.pop("completed_steps") == step
        expected = {f"{name}.{entry}" for name in names for entry in ("candidates", "total", "squares", "updates")}
        assert state.keys() == (expected if updates else set())
        assert all(state[f"{name}.updates"] == updates for name in names if updates)
    assert not [path for path in tmp_path.rglob("*sft_selector*") if path.name != "sft_selector.safetensors"]


def test_a_checkpoint_without_selector_is_reported(base_model, data, tmp_path):
    model = adapt(base_model)
    SftTrainer(Trainer)(model=model, args=arguments(tmp_path), train_dataset=data).train()
    checkpoint = tmp_path / "checkpoint-7"
    (checkpoint / "sft_selector.safetensors").rename(checkpoint / "moved")
    trainer = SftTrainer(Trainer)(model=model, args=arguments(tmp_path), train_dataset=data)
    with pytest.warns(PeftWarning, match="has no sft_selector.safetensors"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.sft_selector.completed_steps == STEPS
    (tmp_path / "checkpoint-5" / "sft_selector.safetensors").rename(checkpoint / "sft_selector.safetensors")
    with pytest.raises(ValueError, match="was saved after 5 update steps, but the checkpoint after 7"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("layers", [False, True])
def test_reselections_are_logged(layers, base_model, data, tmp_path):
    seen = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append({**logs, "step": state.global_step})

    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="no")
    trainer = SftTrainer(Trainer)(
        model=adapt(base_model), args=args, train_dataset=data, eval_dataset=data[:4], callbacks=[Listener()],
        log_sft_layers=layers,
    )  # fmt: skip
    output = trainer.train()
    history = trainer.sft_selector.history
    assert [entry["step"] for entry in history] == [3, 8]
    logged = {entry["step"]: {key: n for key, n in entry.items() if "sft" in key} for entry in seen}
    for entry, step in zip(history, (4, 8)):
        expected = {f"sft_moved/{name.removesuffix('.sft_delta.default')}": n for name, n in entry["layers"].items()}
        assert len(expected) == 7 and sum(expected.values()) == entry["moved"]
        assert logged.pop(step) == {"sft_moved": entry["moved"], **(expected if layers else {})}
    assert not any(logged.values())
    assert sum("loss" in entry for entry in seen) == 3  # and no training log has been lost
    assert sum("eval_loss" in entry for entry in seen) == 4
    assert output.metrics["epoch"] > 0
    json.dumps(trainer.state.log_history)


# ---- The optimiser ----


def test_the_optimizer_follows_the_arguments(base_model, data, tmp_path):
    model = adapt(base_model, modules_to_save=["norm"])
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.3}
    trainer = SftTrainer(Trainer)(model=model, args=arguments(tmp_path, **settings), train_dataset=data)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer(model) is optimizer
    assert type(optimizer) is SftAdamW and optimizer.momentum_dtype == torch.float32
    decaying, others = optimizer.param_groups
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-5)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    norm = model.get_parameter("base_model.model.model.norm.modules_to_save.default.weight")
    assert [id(param) for param in others["params"]] == [id(norm)]
    values = {id(delta.values) for _, _, delta in model.active_deltas()}
    assert {id(param) for param in decaying["params"]} == values


def test_sm3_has_the_deltas(base_model, data, tmp_path):
    model = adapt(base_model, "sm3")
    trainer = SftTrainer(Trainer)(model=model, args=arguments(tmp_path, adam_epsilon=1e-6), train_dataset=data)
    optimizer = trainer.create_optimizer(model)
    assert type(optimizer) is SftSM3
    assert all(optimizer.deltas[delta.values] is delta for _, _, delta in model.active_deltas())
    assert optimizer.param_groups[0]["eps"] == 1e-6 and optimizer.param_groups[0]["lr"] == 0.02


def test_an_optimizer_can_be_brought(base_model, data, tmp_path):
    model = adapt(base_model)
    optimizer = SftAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    args = arguments(tmp_path, optim="adafactor", save_strategy="no")  # not asked for
    trainer = SftTrainer(Trainer)(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    assert trainer.create_optimizer() is optimizer
    trainer = SftTrainer(Trainer)(
        model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=(SftAdamW, {"lr": 0.5, "eps": 1e-3})
    )
    assert isinstance(trainer.create_optimizer(), SftAdamW)
    assert trainer.optimizer.param_groups[0]["eps"] == 1e-3
    trainer.train()
    assert len(trainer.sft_selector.history) == 2


@pytest.mark.parametrize(
    "algorithm, settings, message",
    [
        ("rigl", {"optim": "adafactor"}, "optim='adafactor' cannot be combined with sparse fine-tuning"),
        ("rigl", {"optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit' cannot be combined"),
        ("sm3", {"optim": "sgd"}, "which needs SftSM3; leave `optim` at its default"),
        ("rigl", {"optim_args": "rank=4"}, "optim_args='rank=4' has no meaning for SftAdamW"),
        ("sm3", {"adam_beta1": 0.8}, "adam_beta1=0.8 and adam_beta2=0.999 have no meaning for SftSM3"),
    ],
)
def test_refuses_settings_without_meaning(algorithm, settings, message, base_model, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        SftTrainer(Trainer)(
            model=adapt(base_model, algorithm), args=arguments(tmp_path, **settings), train_dataset=data
        )


class SlowHeadTrainer(OrderedTrainer):
    """A user's trainer that has its own parameter groups: a tenth of the learning rate for the query projections."""

    def create_optimizer(self):
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
        slow = {name: p for name, p in self.model.named_parameters() if p.requires_grad and "q_proj" in name}
        others = [p for name, p in self.model.named_parameters() if p.requires_grad and name not in slow]
        groups = [{"params": list(slow.values()), "lr": self.args.learning_rate / 10}, {"params": others}]
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer


class PatientTrainer(OrderedTrainer):
    """A user's trainer that changes what the Trainer has made."""

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        for group in self.optimizer.param_groups:
            group["lr"] /= 10
        return self.optimizer


class ForeignTrainer(OrderedTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        return self.optimizer


@pytest.mark.parametrize("algorithm, needed", [("rigl", SftAdamW), ("sm3", SftSM3)])
def test_create_optimizer_of_the_base_class_is_respected(algorithm, needed, base_model, data, tmp_path):
    for cls, rates in ((SlowHeadTrainer, [0.002, 0.02]), (PatientTrainer, [0.002, 0.002])):
        args = arguments(tmp_path, save_strategy="no", lr_scheduler_type="constant")
        trainer = SftTrainer(cls)(model=adapt(base_model, algorithm), args=args, train_dataset=data)
        trainer.train()
        assert type(trainer.optimizer.optimizer) is needed
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(rates)
        assert len(trainer.sft_selector.history) == 2
    trainer = SftTrainer(ForeignTrainer)(model=adapt(base_model, algorithm), args=args, train_dataset=data)
    with pytest.raises(TypeError, match=f"of ForeignTrainer made AdamW, but selection_algorithm='{algorithm}' needs"):
        trainer.train()


class OwnSettingsTrainer(OrderedTrainer):
    """Settings that would be lost if SftTrainer's own method went before this one without a word."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return cls, kwargs | {"eps": 0.5}


class LargeEpsilonTrainer(SftTrainer(OrderedTrainer)):
    def get_optimizer_cls_and_kwargs(self, args, model=None):
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, kwargs | {"eps": 0.5}


@pytest.mark.parametrize("algorithm, needed", [("rigl", SftAdamW), ("sm3", SftSM3)])
def test_settings_of_the_base_class_are_refused_or_taken(algorithm, needed, base_model, data, tmp_path):
    model, args = adapt(base_model, algorithm), arguments(tmp_path, save_strategy="no")
    make = SftTrainer(OwnSettingsTrainer)
    message = f"OwnSettingsTrainer overrides get_optimizer_cls_and_kwargs, .*{algorithm!r} needs {needed.__name__}"
    with pytest.raises(ValueError, match=message):
        make(model=model, args=args, train_dataset=data)
    brought = make(
        model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=SftTrainer(OrderedTrainer)(
            model=model, args=args, train_dataset=data
        ).get_optimizer_cls_and_kwargs(args)
    )  # fmt: skip
    assert type(brought.create_optimizer()) is needed
    trainer = LargeEpsilonTrainer(model=model, args=args, train_dataset=data)
    assert type(trainer.create_optimizer()) is needed and trainer.optimizer.param_groups[0]["eps"] == 0.5
    static = make(model=adapt(base_model, "static"), args=args, train_dataset=data)
    assert type(static.create_optimizer()) is torch.optim.AdamW
    assert static.optimizer.param_groups[0]["eps"] == 0.5


def test_the_static_method_of_the_trainer_stays_one(tmp_path):
    args = arguments(tmp_path)
    for base, eps in ((OrderedTrainer, 1e-8), (OwnSettingsTrainer, 0.5)):
        cls, kwargs = SftTrainer(base).get_optimizer_cls_and_kwargs(args)
        assert cls is torch.optim.AdamW and kwargs["eps"] == eps
    assert OwnTrainer.get_optimizer_cls_and_kwargs(args)[0] is torch.optim.AdamW


def test_every_other_optimizer_of_the_arguments_is_refused(base_model, data, tmp_path):
    model = adapt(base_model)
    refused = set()
    for name in OptimizerNames:
        args = arguments(tmp_path, save_strategy="no")
        args.optim = name  # not handed to the constructor, which wants some of them to be installed
        try:
            SftTrainer(Trainer)(model=model, args=args, train_dataset=data)
        except ValueError as error:
            assert f"optim={name.value!r} cannot be combined with sparse fine-tuning" in str(error)
            refused.add(name)
    assert set(OptimizerNames) - refused == {OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED}


def test_refuses_other_optimizers(base_model, data, tmp_path):
    model = adapt(base_model)
    params = [p for p in model.parameters() if p.requires_grad]
    for brought in (
        {"optimizers": (torch.optim.AdamW(params), None)},
        {"optimizers": (SftSM3(params, {}), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
    ):
        with pytest.raises(ValueError, match="selection_algorithm='rigl' needs the optimizer SftAdamW, got <class"):
            SftTrainer(Trainer)(model=model, args=arguments(tmp_path), train_dataset=data, **brought)


def test_refuses_models_without_sft(base_model, data, tmp_path):
    make = SftTrainer(Trainer)
    with pytest.raises(ValueError, match="The model has no adapter to take `sft_config` from"):
        make(model=base_model, args=arguments(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no active SFT adapter"):
        make(model=base_model, args=arguments(tmp_path), train_dataset=data, sft_config=SftConfig())
    lora = get_peft_model(copy.deepcopy(base_model), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="SftTrainer needs an SftConfig, got LoraConfig"):
        make(model=lora, args=arguments(tmp_path), train_dataset=data)


def test_the_given_config_is_the_schedule(base_model, data, tmp_path):
    config = SftConfig(reselection_steps=4, selection_accumulation_steps=1)
    args = arguments(tmp_path, save_strategy="no")
    trainer = SftTrainer(Trainer)(model=adapt(base_model), args=args, train_dataset=data, sft_config=config)
    trainer.train()
    assert [entry["step"] for entry in trainer.sft_selector.history] == [1, 5, 9]


# ---- The examples ----


@pytest.fixture
def tiny_model(tmp_path):
    """A folder with a tiny language model and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tiny")
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("example", ["sft_custom_loop", "sft_trainer"])
@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_the_examples_run(example, algorithm, tiny_model, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    main = importlib.import_module(example).main
    output = tiny_model.parent / "adapter"
    settings = {"model": tiny_model, "steps": 14, "learning-rate": 0.02, "density": 0.2, "output": output}
    main([f"--{key}={value}" for key, value in settings.items()] + [f"--selection-algorithm={algorithm}"])
    printed = capsys.readouterr().out
    assert printed.count("reselected after step 5:") == 1
    before, after = (float(printed.split(f"held-out loss {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before - 0.05
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, output)
    moved = [name for name, tensor in adapter_state(model).items() if name.endswith("values") and tensor.any()]
    assert len(moved) == 14  # seven linear layers in each of two blocks
