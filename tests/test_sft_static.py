"""Positions chosen once, against gradients of the plain base model."""

import copy
import random

import numpy as np
import pytest
import torch
from sft_runs import assert_same
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import (
    PeftModel,
    PeftWarning,
    SftConfig,
    SftModel,
    SftSelector,
    SftTrainer,
    get_peft_model,
    select_static,
    set_peft_model_state_dict,
)

CRITERIA = ("gradient", "fisher", "magnitude")


class Net(nn.Module):
    """A layer of every kind, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)
        self.conv = nn.Conv1d(6, 5, 3)
        self.last = nn.Linear(5, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        h = self.embedding(x)
        h = self.dropout(torch.tanh(self.twice(torch.sin(self.twice(h)))))
        return self.head(self.last(torch.tanh(self.conv(h.transpose(1, 2))).sum(2)))


TARGETS = ["embedding", "twice", "conv", "last"]


def make(criterion="gradient", dtype=torch.float64, base=None, **settings):
    config = SftConfig(
        selection_algorithm="static",
        static_criterion=criterion,
        target_modules=TARGETS,
        density=0.2,
        dtype="auto",
        **settings,
    )
    return SftModel((base or Net()).to(dtype), config, "default")


def random_batches(count=3):
    return [(torch.randint(11, (4, 7)), torch.randn(4, 2, dtype=torch.float64)) for _ in range(count)]


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def chosen(model):
    return {name.split(".")[0]: delta.indices.tolist() for _, name, delta in model.active_deltas()}


def reference(base, batches, criterion):
    """Positions by dense gradients of the unadapted model, one layer after the other."""
    net = copy.deepcopy(base).eval().requires_grad_(True)
    sums = {name: torch.zeros_like(getattr(net, name).weight) for name in TARGETS}
    for batch in batches:
        net.zero_grad()
        loss_of(net, batch).backward()
        for name, total in sums.items():
            grad = getattr(net, name).weight.grad
            total += grad**2 if criterion == "fisher" else grad
    if criterion == "magnitude":
        sums = {name: getattr(net, name).weight.detach() for name in TARGETS}
    return {name: total.abs().flatten() for name, total in sums.items()}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("workspace", [0, 700, 2**30])
def test_positions_have_the_largest_scores(criterion, workspace):
    base, batches = Net().double(), random_batches()
    for parameter in base.parameters():  # torch draws float32 in steps of 2^-24, so that two may be equally large
        nn.init.uniform_(parameter, -0.5, 0.5)
    scores = reference(base, batches, criterion)
    model = make(criterion, base=base)
    before = chosen(model)
    select_static(model, batches, loss_of, workspace_bytes=workspace, progress=False)
    for name, positions in chosen(model).items():
        k = len(before[name])
        assert positions == scores[name].topk(k).indices.sort().values.tolist(), name
    assert chosen(model) != before
    assert all(delta.is_selected and delta.observer is None for _, _, delta in model.active_deltas())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_groups_have_the_largest_scores(criterion, granularity):
    base, batches = Net().double(), random_batches()
    scores = reference(base, batches, criterion)
    model = make(criterion, base=base, granularity=granularity)
    select_static(model, batches, loss_of, progress=False)
    for name, groups in chosen(model).items():
        weight = scores[name].view(getattr(base, name).base_layer.weight.shape)
        outputs_first = weight.T if name == "embedding" else weight
        grouped = (outputs_first if granularity == "row" else outputs_first.transpose(0, 1)).flatten(1)
        of_groups = grouped.sum(1) if criterion == "fisher" else grouped.norm(dim=1)
        assert groups == of_groups.topk(len(groups)).indices.sort().values.tolist(), name
    assert any(chosen(model).values())


def test_blocks_have_the_largest_scores():
    base = nn.Linear(9, 7).double()
    config = SftConfig(
        selection_algorithm="static", static_criterion="magnitude", target_modules=["0"], granularity="block",
        block_size=2, num_tunable_weights=16,
    )  # fmt: skip
    model = SftModel(nn.Sequential(base), config, "default")
    select_static(model, progress=False)
    squares = base.weight.detach()[:6, :8].square().view(3, 2, 4, 2).sum((1, 3)).flatten()
    assert chosen(model)["0"] == squares.topk(4).indices.sort().values.tolist()


def test_fisher_and_gradient_differ():
    base, batches = Net().double(), random_batches(6)
    results = []
    for criterion in ("fisher", "gradient"):
        model = make(criterion, base=copy.deepcopy(base))
        select_static(model, batches, loss_of, progress=False)
        results.append(chosen(model))
    assert results[0] != results[1]


def test_random_leaves_the_positions():
    model = make("random")
    before = chosen(model)
    SftSelector(model, torch.optim.SGD(model.parameters(), 0.1), model.peft_config["default"], 5, 1).step()
    select_static(model)
    assert chosen(model) == before


def test_half_precision_gradients_are_summed_in_float32():
    linear = nn.Linear(8, 8, bias=False)
    config = SftConfig(
        selection_algorithm="static", static_criterion="gradient", target_modules=["0"], num_tunable_weights=1
    )
    model = SftModel(nn.Sequential(linear.to(torch.bfloat16)), config, "default")
    x = torch.eye(8, dtype=torch.bfloat16)
    large, small = torch.zeros(2, 8, 8, dtype=torch.bfloat16)
    large[1, 2] = large[3, 4] = 256.0
    small[3, 4] = 0.25  # in bfloat16, 256 + 0.25 = 256
    batches = [large] + [small] * 4
    select_static(model, batches, lambda m, g: (m(x).T * g).sum(), progress=False)
    assert chosen(model) == {"0": [3 * 8 + 4]}


def test_nothing_else_changes():
    model = make()
    model.train()
    model.model.conv.eval()
    model.model.head.requires_grad_(True)
    model.model.head.weight.grad = torch.ones_like(model.model.head.weight)
    parameters = {name: (p.clone(), p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    batches = iter(random_batches())
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def noisy_loss(model, batch):
        random.random(), np.random.rand(), torch.rand(1)
        return loss_of(model, batch)

    select_static(model, batches, noisy_loss, workspace_bytes=0, progress=False)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert modes == {name: module.training for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        old, requires_grad, pointer = parameters[name]
        assert parameter.requires_grad == requires_grad and parameter.data_ptr() == pointer, name
        assert name.endswith("indices") or torch.equal(parameter, old), name
        if name != "model.head.weight":
            assert parameter.grad is None, name
    assert torch.equal(model.model.head.weight.grad, torch.ones_like(model.model.head.weight))


def test_the_model_is_restored_after_an_error():
    model = make()

    def broken(model, batch):
        loss_of(model, batch)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        select_static(model, random_batches(), broken, progress=False)
    assert model.training and all(delta.values.requires_grad for _, _, delta in model.active_deltas())
    assert not any(delta.observer or delta.is_selected for _, _, delta in model.active_deltas())


@pytest.mark.parametrize("workspace", [1, 2**30])  # one layer at a time, all together
def test_a_layer_without_use_keeps_its_positions(workspace):
    class Partly(Net):
        def forward(self, x):
            return self.head(self.last(self.embedding(x).sum(1)[:, :5]))

    model = make(base=Partly())
    before = chosen(model)
    with pytest.warns(PeftWarning, match="2 adapted layers took no part in the calibration, such as .'twice"):
        select_static(model, random_batches(), loss_of, workspace_bytes=workspace, progress=False)
    after = chosen(model)
    assert after["twice"] == before["twice"] and after["conv"] == before["conv"]
    found, drawn = ([where["last"], where["embedding"]] for where in (after, before))
    assert found != drawn  # one alone may be drawn by luck


def test_a_second_adapter_that_stays_active_is_seen():
    """The gradient is taken where training will start: with the other active adapters in the weight."""
    base, batches = Net().double(), random_batches()
    model = make("random", base=copy.deepcopy(base))
    with torch.no_grad():
        for _, name, delta in model.active_deltas():
            delta.values.normal_()
            getattr(base, name.split(".")[0]).weight.view(-1)[delta.indices.long()] += delta.values
    config = SftConfig(selection_algorithm="static", target_modules=TARGETS, density=0.2, dtype="auto")
    model.peft_config["new"] = config
    model.inject_adapter(model.model, "new")
    model.set_adapter(["default", "new"])
    with pytest.raises(ValueError, match="default has been trained already"):
        select_static(model, batches, loss_of, criterion="gradient", progress=False)
    # what belongs to a trained adapter cannot be chosen, so only the new one is offered
    offered = [entry for entry in model.active_deltas() if entry[1].endswith(".new")]
    model.active_deltas = lambda: iter(offered)
    select_static(model, batches, loss_of, criterion="gradient", progress=False)
    scores = reference(base, batches, "gradient")
    for name, positions in chosen(model).items():
        assert positions == scores[name].topk(len(positions)).indices.sort().values.tolist(), name


# ---- What is refused ----


def test_refuses_what_cannot_be_chosen():
    model = make()
    with pytest.raises(ValueError, match="needs `batches` of the training data, got none"):
        select_static(model, loss_fn=loss_of)
    with pytest.raises(ValueError, match="needs `batches`"):
        select_static(model, [], loss_of, criterion="fisher")
    with pytest.raises(ValueError, match="criterion must be one of .*, got 'best'"):
        select_static(model, random_batches(), loss_of, criterion="best")
    with pytest.raises(ValueError, match="A batch is a tuple, not a dict"):
        select_static(model, random_batches(), progress=False)
    with pytest.raises(ValueError, match="The model returned no loss"):
        select_static(model, [{"x": random_batches()[0][0]}], progress=False)
    with pytest.raises(ValueError, match=r"embedding.* are not finite"):
        select_static(model, random_batches(), lambda m, b: loss_of(m, b) * float("nan"), progress=False)
    model.disable_adapter_layers()
    with pytest.raises((ValueError, RuntimeError), match="depends on none of the adapted layers|does not require grad"):
        select_static(model, random_batches(), loss_of, progress=False)
    with pytest.raises(ValueError, match="no active SFT adapter"):
        select_static(Net(), random_batches(), loss_of)


def test_refuses_a_trained_adapter():
    model = make()
    with torch.no_grad():
        next(model.active_deltas())[2].values[0] = 1.0
    with pytest.raises(ValueError, match="embedding.sft_delta.default has been trained already"):
        select_static(model, random_batches(), loss_of)


def test_refuses_an_adapter_without_criterion():
    config = SftConfig(target_modules=TARGETS, density=0.2)
    model = SftModel(Net(), config, "default")
    with pytest.raises(ValueError, match="static_criterion .*None.*give `criterion`"):
        select_static(model)
    select_static(model, criterion="magnitude")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"static_criterion": "hessian"}, "static_criterion must be 'gradient', .* or None, got 'hessian'"),
        ({"static_criterion": "fisher", "selection_algorithm": "sm3"}, "'fisher' has no meaning with .*'sm3'"),
        ({"selection_algorithm": "static", "calibration_batches": 0}, "calibration_batches must be at least 1, got 0"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SftConfig(**{"selection_algorithm": "static", **settings})


def test_a_failed_choice_does_not_count_as_one():
    model = make()
    with pytest.raises(ValueError, match="depends on none of the adapted layers"):
        select_static(model, random_batches(), lambda model, batch: torch.zeros(()), progress=False)
    assert not any(delta.is_selected for _, _, delta in model.active_deltas())


def test_the_selector_wants_chosen_positions():
    model = make("fisher")
    config = model.peft_config["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(ValueError, match="4 deltas, such as embedding.sft_delta.default, were drawn.*select_static"):
        SftSelector(model, optimizer, config, 9, 1)
    select_static(model, random_batches(), loss_of, progress=False)
    positions = chosen(model)
    selector = SftSelector(model, optimizer, config, 9, 1)
    for batch in random_batches(9):
        loss_of(model, batch).backward()
        optimizer.step()
        selector.step()
    assert chosen(model) == positions and selector.history == []
    assert selector.state_dict() == {"completed_steps": torch.tensor(9)}
    with pytest.raises(TypeError, match="needs the optimizer Optimizer, got int"):
        SftSelector(model, 3, config, 9, 1)


def test_loaded_positions_are_chosen(tmp_path):
    base = Net()
    config = make("fisher", base=copy.deepcopy(base)).peft_config["default"]
    model = get_peft_model(copy.deepcopy(base), config)
    select_static(model, [(x, y.float()) for x, y in random_batches()], loss_of, progress=False)
    model.save_pretrained(tmp_path)

    def selector(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        return SftSelector(model, torch.optim.SGD(trained, 0.1), config, 9, 1)

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert chosen(loaded) == chosen(model)
    selector(loaded)
    other = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    with pytest.raises(ValueError, match="call select_static"):
        selector(other)
    other.load_state_dict(model.state_dict())
    selector(other)
    other = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    set_peft_model_state_dict(other, {})
    with pytest.raises(ValueError, match="call select_static"):
        selector(other)


# ---- Trainer ----


@pytest.fixture
def base_model():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def data():
    rows = torch.randint(32, (40, 6))
    return [{"input_ids": row, "labels": row} for row in rows]


def adapt(base_model, criterion):
    config = SftConfig(
        task_type="CAUSAL_LM",
        density=0.1,
        selection_algorithm="static",
        static_criterion=criterion,
        calibration_batches=2,
    )
    return get_peft_model(copy.deepcopy(base_model), config)


def arguments(folder, **settings):
    return TrainingArguments(
        str(folder),
        **{"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 0.02, **settings},
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


def adapter_state(model):
    return {name: tensor.clone() for name, tensor in model.named_parameters() if "sft_delta" in name}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_trainer_chooses_and_resumes(criterion, base_model, data, tmp_path):
    model = adapt(base_model, criterion)
    others = {step: copy.deepcopy(model) for step in (2, 6)}
    twin = copy.deepcopy(model)
    trainer = SftTrainer(Trainer)(model=model, args=arguments(tmp_path / "a"), train_dataset=data)
    seen = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.append(inputs["input_ids"].clone()) or compute_loss(model, inputs, *args, **kwargs)
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    calibration = seen[: len(seen) - 12]
    assert len(calibration) == (0 if criterion == "magnitude" else 2)
    assert all(torch.equal(one, other) for one, other in zip(calibration, seen[len(calibration) :]))

    # The same as choosing by hand and training without any choice in the trainer: data and dropout are the same, too.
    batches = [{"input_ids": ids, "labels": ids} for ids in calibration]
    select_static(twin, batches, progress=False)
    SftTrainer(Trainer)(model=twin, args=arguments(tmp_path / "b", save_strategy="no"), train_dataset=data).train()
    assert_same(adapter_state(model), adapter_state(twin))

    for step, other in others.items():
        args = arguments(tmp_path / "c", save_strategy="no")
        resumed = SftTrainer(Trainer)(model=other, args=args, train_dataset=data)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_same(adapter_state(model), adapter_state(other))


def test_calibration_leaves_no_loader_behind(base_model, data, tmp_path):
    """accelerate would take a loader that was not read to its end for the current one."""
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="no")
    trainer = SftTrainer(Trainer)(model=adapt(base_model, "fisher"), args=args, train_dataset=data)
    before = list(trainer.accelerator.gradient_state.dataloader_references)
    trainer.train()
    assert trainer.state.global_step == 14
    left = [r for r in trainer.accelerator.gradient_state.dataloader_references if not any(r is b for b in before)]
    assert all(loader is trainer.callback_handler.train_dataloader for loader in left)
    assert len(trainer.accelerator._dataloaders) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, base_model, data):
    base_model.config.attention_dropout = 0.0
    results = []
    batches = [{key: value[None] for key, value in row.items()} for row in data[:3]]
    start = adapt(base_model, "gradient")
    for checkpointing in (True, False):
        model = copy.deepcopy(start).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        select_static(model, batches, progress=False)
        results.append(adapter_state(model))
    assert_same(*results)
    assert chosen(start) != chosen(model)
