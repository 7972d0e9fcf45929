"""The `peft` command: what it trains on, how it is stopped and resumed, tasks, inspecting and merging."""

from __future__ import annotations

import errno
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import load_weights, run, train, words
from tiny_models import CHAT_TEMPLATE, make_tokenizer

from peft.cli import arguments, common, data, tasks

pytest_plugins = ["cli_runs"]
pytestmark = pytest.mark.usefixtures("loud_transformers")
DOCS = Path(__file__).parent.parent / "docs" / "source" / "cli.md"


def decode_trained(tokenizer, example: data.Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != data.IGNORED])


# ---- What is trained on ----


def test_loss_is_on_the_completion_only():
    tokenizer, prompt, completion = make_tokenizer(), words(4), " " + words(2)
    example = data.encode_row(tokenizer, {"prompt": prompt, "completion": completion})
    assert tokenizer.decode(example.ids) == prompt + completion + "<|im_end|>"
    assert decode_trained(tokenizer, example) == completion + "<|im_end|>"
    assert tokenizer.decode(example.prompt) == prompt
    whole = data.encode_row(tokenizer, {"prompt": prompt, "completion": completion}, loss_on="all")
    assert whole.ids == example.ids
    assert whole.labels == [data.IGNORED, *whole.ids[1:]]


def test_text_is_trained_on_whole_after_its_beginning():
    tokenizer, text = make_tokenizer(add_bos=True), words(5)
    example = data.encode_row(tokenizer, {"text": text})
    assert tokenizer.decode(example.ids) == "<s>" + text + "<|im_end|>"
    assert decode_trained(tokenizer, example) == text + "<|im_end|>"


def test_loss_is_on_the_turns_of_the_assistant_only():
    tokenizer = make_tokenizer()
    said = [words(3) for _ in range(5)]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said)]
    example = data.encode_row(tokenizer, {"messages": messages})
    assert tokenizer.decode(example.ids) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
    assert decode_trained(tokenizer, example) == f"{said[2]}<|im_end|>{said[4]}<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(example.prompt) == prompt
    # The turns that follow the last of the assistant's are no part of any reply.
    asked_again = data.encode_row(tokenizer, {"messages": [*messages, {"role": "user", "content": words(1)}]})
    assert decode_trained(tokenizer, asked_again) == decode_trained(tokenizer, example)


def test_a_token_across_the_border_is_split():
    tokenizer = make_tokenizer(merges=[("a", "b"), ("b", "c")])
    example = data.encode_row(tokenizer, {"prompt": "xa", "completion": "bc"})
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["x", "a", "bc", "<|im_end|>"]
    assert example.prompt == tokenizer("xa")["input_ids"]  # what the model is given at inference


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(common.CliError, match="line 7.*rewrites earlier turns"):
        messages = [{"role": role, "content": "x"} for role in ("user", "assistant")] * 2
        data.encode_row(tokenizer, {"messages": messages, "__where__": "chats.jsonl, line 7"})


def test_what_is_too_long_is_cut_or_left_out():
    tokenizer = make_tokenizer()
    rows = [{"prompt": "a" * n, "completion": "b" * 10} for n in (5, 15, 30)]
    examples, cut, dropped = data.encode_rows(tokenizer, rows, max_length=20)
    assert [len(example.ids) for example in examples] == [16, 20]
    assert (cut, dropped) == (2, 1)


# ---- Packing ----


def random_examples(count: int, longest: int, vocabulary: int) -> list[data.Example]:
    examples = []
    for _ in range(count):
        ids = torch.randint(4, vocabulary, (random.randint(2, longest),)).tolist()
        examples.append(data.Example(ids, [data.IGNORED, *ids[1:]]))
    return examples


def test_packing_keeps_every_example_whole():
    examples = random_examples(50, longest=20, vocabulary=1000)
    packs = data.pack(examples, max_length=32)
    found = []
    for pack in packs:
        assert len(pack.ids) == len(pack.labels) == len(pack.positions) <= 32
        starts = [i for i, position in enumerate(pack.positions) if position == 0] + [len(pack.ids)]
        for start, end in zip(starts, starts[1:]):
            assert pack.positions[start:end] == list(range(end - start))
            found.append((pack.ids[start:end], pack.labels[start:end]))
    assert sorted(found) == sorted((example.ids, example.labels) for example in examples)
    assert len(packs) <= 1.25 * sum(len(example.ids) for example in examples) / 32 + 1  # first fit leaves little room


def test_packed_examples_do_not_see_each_other(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    data.check_packing(model)
    examples = random_examples(7, longest=12, vocabulary=model.config.vocab_size)
    collate = data.Collator(pad_id=0)
    packs = data.pack(examples, max_length=24)
    assert len(packs) < len(examples)
    losses = []
    for batch in (collate(packs), collate(examples)):
        model.zero_grad()
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]  # transformers' own loss is in float32
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        losses.append((loss.detach(), model.lm_head.weight.grad.clone(), model.model.norm.weight.grad.clone()))
    for packed, alone in zip(*losses):
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-8)  # Llama's norms are in float32


def test_packing_is_refused_where_examples_would_see_each_other(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(common.CliError, match="would see each other"):
        data.check_packing(model)


# ---- A run from beginning to end ----


@pytest.mark.parametrize("method", ["sft", "lora", "ssf"])
def test_training_lowers_the_held_out_loss(method, tiny, rows_file, tmp_path, capsys):
    output = tmp_path / "deep" / "out"
    assert train(tiny, rows_file, output, "--method", method, "--lr", "0.02", "--max-steps", 12, "--eval-size", 5) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.json",
    ]  # fmt: skip
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["metric"] == "loss" and metrics["after"] < metrics["before"]  # by 0.15 to 0.5
    assert metrics["steps"] == 12 and metrics["tokens"] > 0 and metrics["held_out_examples"] == 5
    assert f"{metrics['after']:.4f}" in printed and f"{metrics['trainable_parameters']:,}" in printed
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    assert run("evaluate", output) == 0
    assert re.findall(r"\d\.\d{4}", capsys.readouterr().out) == [f"{metrics['after']:.4f}"] * 2
    assert run("evaluate", output, "--check") == 0
    (output / "metrics.json").write_text(json.dumps(metrics | {"after": metrics["after"] + 0.01}))
    assert run("evaluate", output, "--check") == 1


def test_before_is_the_base_model(tiny, rows_file, tmp_path):
    """The loss before training, computed here row by row in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert train(tiny, rows_file, tmp_path / "out", "--max-steps", 1, "--eval-size", 7) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    _, held_out = data.split_rows(data.read_rows(rows_file), 7, None, seed=0)
    losses = []
    for row in held_out:
        start, end = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = torch.tensor([[*start, *end, tokenizer.eos_token_id]])
        with torch.no_grad():
            probabilities = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]])[len(start) - 1 :].tolist()
    assert metrics["before"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("options", [["--packing", "--max-length", "64"], ["--gradient-checkpointing"]], ids=" ".join)
def test_options_of_training(options, tiny, rows_file, tmp_path):
    assert train(tiny, rows_file, tmp_path / "out", *options, "--lr", "0.02", "--max-steps", 8, "--grad-accum", 2) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["after"] < metrics["before"]


def test_task_from_beginning_to_end(tiny, tmp_path, capsys):
    pytest.importorskip("reasoning_gym")
    output, args = tmp_path / "out", '{"max_words": 3}'
    sizes = ("--train-size", 8, "--eval-size", 6)
    assert train(tiny, "task:word_sequence_reversal", output, "--task-args", args, *sizes) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["metric"] == "accuracy" and 0 <= metrics["after"] <= 1 and metrics["steps"] == 2
    assert metrics["samples"][0].keys() == {"question", "answer", "before", "after"}
    capsys.readouterr()
    assert run("evaluate", output) == 0
    assert re.findall(r"[\d.]+ %", capsys.readouterr().out) == [f"{100 * metrics['after']:.1f} %"] * 2


# ---- Stopping and resuming ----


@pytest.mark.parametrize(
    "options, fields",
    [
        (
            ("--selection-algorithm", "static", "--static-criterion", "fisher"),
            {"selection_algorithm": "static", "static_criterion": "fisher"},
        ),
        (("--granularity", "block", "--block-size", "8"), {"granularity": "block", "block_size": 8}),
        (("--budget", "global", "--reselection-steps", "2"), {"budget": "global", "reselection_steps": 2}),
    ],
)
def test_sft_options_reach_the_adapter(options, fields, tiny, rows_file, tmp_path):
    assert train(tiny, rows_file, tmp_path / "out", "--max-steps", 3, "--density", "0.05", *options) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in fields} == fields


def test_help_shows_the_texts_and_choices_of_the_configuration(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--static-criterion {gradient,fisher,magnitude,random}" in text
    assert 'Side of the tiles that granularity="block" chooses. Default: 16.' in text


@pytest.mark.parametrize("method", ["sft", "lora"])
def test_a_resumed_run_equals_an_unbroken_one(method, tiny, rows_file, tmp_path, stop_at, capsys):
    options = ("--method", method, "--max-steps", 9, "--save-steps", 3, "--lr", "0.01")
    options += ("--reselection-steps", 4) if method == "sft" else ("--dropout", "0.1")
    assert train(tiny, rows_file, tmp_path / "unbroken", *options) == 0
    output = tmp_path / "broken"
    stop_at(5)
    assert train(tiny, rows_file, output, *options) == 130
    assert "checkpoint-3 is kept" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["checkpoints"]
    half = output / "checkpoints" / "checkpoint-4"  # as a machine that dies while writing leaves it
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch":')
    stop_at(0)
    assert train(tiny, rows_file, output, *options) == 2
    assert "holds an unfinished run (--resume" in capsys.readouterr().err
    assert train(tiny, rows_file, output, *options, "--resume", "--lr", "0.02") == 2
    assert "was begun with --lr 0.01, and not --lr 0.02" in capsys.readouterr().err
    assert train(tiny, rows_file, output, *options, "--resume") == 0

    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("unbroken", "broken")]
    assert metrics[1]["resumed_from_step"] == 3
    assert all(metrics[0][key] == metrics[1][key] for key in ("before", "after", "steps", "tokens"))
    unbroken, broken = load_weights(tmp_path / "unbroken"), load_weights(output)
    assert unbroken.keys() == broken.keys()
    assert all(torch.equal(unbroken[key], broken[key]) for key in unbroken)
    assert not (output / "checkpoints").exists()
    assert train(tiny, rows_file, output, *options, "--resume") == 0  # nothing to do, and no harm


def test_changed_data_is_not_resumed(tiny, rows_file, tmp_path, stop_at, capsys):
    stop_at(2)
    assert train(tiny, rows_file, tmp_path / "out", "--max-steps", 4, "--save-steps", 1) == 130
    with open(rows_file, "a") as file:
        file.write('{"prompt": "new", "completion": " row"}\n')
    capsys.readouterr()
    assert train(tiny, rows_file, tmp_path / "out", "--max-steps", 4, "--resume") == 2
    assert f"{rows_file} has changed" in capsys.readouterr().err


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(tiny, rows_file, tmp_path, stop_at):
    stop_at(1)
    assert train(tiny, rows_file, tmp_path / "deep" / "out", "--max-steps", 4, "--save-steps", 2) == 130
    assert not (tmp_path / "deep").exists()


# ---- Tasks ----


def test_one_process_uses_one_gpu(tiny, rows_file, tmp_path, monkeypatch, capsys):
    """Trainer would drive all of them by nn.DataParallel, which SFT refuses."""
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: args._n_gpu or 2))  # 0: no GPU is used
    assert train(tiny, rows_file, tmp_path / "run", "--max-steps", 2) == 0
    assert "one of 2 GPUs is used; for all of them start with torchrun --nproc-per-node 2" in capsys.readouterr().err


def test_held_out_problems_are_not_trained_on():
    pytest.importorskip("reasoning_gym")
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # under 200 different problems
    seed = random.randrange(1000)
    task = tasks.Task("chain_sum", settings, train_size=300, eval_size=40, seed=seed)
    held_out, trained = ({problem["question"] for problem in half} for half in (task.held_out, task.train))
    assert len(task.train) == 300 and len(held_out) == len(task.held_out) == 40
    assert not held_out & trained
    again = tasks.Task("chain_sum", settings, train_size=300, eval_size=40, seed=seed)
    assert again.train == task.train and again.held_out == task.held_out
    assert all(task.is_correct(problem["answer"], problem) for problem in task.held_out)
    assert task.is_correct(f"<think>\n\n</think>\n\n{held_out and task.held_out[0]['answer']}", task.held_out[0])
    assert not task.is_correct("no idea", task.held_out[0])


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("chain_sums", {}, "no task 'chain_sums'.*chain_sum"),
        ("chain_sum", {"max_term": 3}, "refuses --task-args.*max_term"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "refuses --task-args"),
        ("chain_sum", {"min_terms": 2.5}, "refuses --task-args"),  # noticed when it is used
        ("chain_sum", {"seed": 3}, "cannot hold.*seed"),
        ("chain_sum", {"max_terms": 2, "max_digits": 1}, "too few different problems"),
    ],
)
def test_tasks_that_cannot_be_had(name, settings, expected):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(common.CliError, match=expected):
        tasks.Task(name, settings, train_size=10, eval_size=1000, seed=0)


def test_prompts_of_tasks_fit_the_model():
    problem = {"question": "1 + 1 =", "answer": "2"}
    tokenizer = make_tokenizer()
    assert [m["role"] for m in tasks.task_row(tokenizer, problem)["messages"]] == ["system", "user", "assistant"]
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    )
    messages = tasks.task_row(tokenizer, problem)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] and tasks.INSTRUCTION in messages[0]["content"]
    tokenizer.chat_template = None
    assert tasks.task_row(tokenizer, problem) == {"prompt": "1 + 1 =\nAnswer:", "completion": " 2"}


# ---- inspect and merge ----


@pytest.mark.parametrize("method", ["sft", "lora", "ssf"])
def test_inspect_and_merge(method, tiny, rows_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft import PeftModel

    adapter, merged = tmp_path / "adapter", tmp_path / "deep" / "merged"
    assert train(tiny, rows_file, adapter, "--method", method, "--lr", "0.02", "--max-steps", 4) == 0
    trained = json.loads((adapter / "metrics.json").read_text())["trainable_parameters"]
    capsys.readouterr()
    assert run("inspect", adapter) == 0
    printed = capsys.readouterr().out
    assert f"{method.upper()}" in printed and tiny in printed and "model.layers.*.mlp.up_proj" in printed
    assert printed.splitlines()[-1].startswith(f"{trained:,} parameters")
    assert run("inspect", adapter, "--all") == 0
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().out

    assert run("merge", tiny, adapter, "-o", merged) == 0
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]
    ids = torch.randint(4, 260, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(adapter))(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(merged).chat_template == CHAT_TEMPLATE


def test_merging_gives_biases_to_layers_that_had_none(tiny, rows_file, tmp_path, capsys):
    """A model whose configuration says "no biases" would load without them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from peft import PeftModel

    options = ("--method", "ssf", "--lr", "0.05", "--max-steps", 3, "--target-modules", "q_proj,up_proj")
    assert train(tiny, rows_file, tmp_path / "adapter", *options) == 0
    assert run("merge", tiny, tmp_path / "adapter", "-o", tmp_path / "merged") == 0
    ids = torch.randint(4, 260, (2, 9))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)

    qwen = tmp_path / "qwen"
    config = Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(qwen)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(qwen)
    assert train(str(qwen), rows_file, tmp_path / "adapter2", *options) == 0
    capsys.readouterr()
    assert run("merge", qwen, tmp_path / "adapter2", "-o", tmp_path / "merged2") == 2
    assert "has no place for in its files, such as model.layers.0.mlp.up_proj.bias" in capsys.readouterr().err
    assert not (tmp_path / "merged2").exists()


def test_inspect_counts_a_model(tiny, capsys):
    from transformers import AutoModelForCausalLM

    assert run("inspect", tiny) == 0
    count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny).parameters())
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"{count:,} parameters, {common.format_bytes(4 * count)}")
    )


def test_merge_refuses_and_replaces(tiny, rows_file, tmp_path, capsys):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert train(tiny, rows_file, adapter, "--max-steps", 1) == 0
    merged.mkdir()
    (merged / "mine.txt").write_text("mine")
    capsys.readouterr()
    for argv, expected in [
        (["merge", tiny, adapter, "-o", merged], "is not empty"),
        (["merge", tiny, merged, "-o", tmp_path / "new"], "is not an adapter"),
        (["merge", tiny, adapter, "-o", adapter, "--overwrite"], "would replace the adapter"),
        (["merge", tmp_path / "nowhere", adapter, "-o", tmp_path / "new"], "cannot load"),
        (["inspect", merged], "neither an adapter"),
        (["evaluate", merged], "has no metrics.json"),
    ]:
        assert run(*argv) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and expected in error[0]
    assert (merged / "mine.txt").exists() and not (tmp_path / "new").exists()
    assert run("merge", tiny, adapter, "-o", merged, "--overwrite") == 0
    assert (merged / "config.json").exists() and not (merged / "mine.txt").exists()


def test_a_merge_that_fails_leaves_nothing(tiny, rows_file, tmp_path, monkeypatch, capsys):
    from transformers import LlamaForCausalLM

    def fail(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    assert train(tiny, rows_file, tmp_path / "adapter", "--max-steps", 1) == 0
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert run("merge", tiny, tmp_path / "adapter", "-o", tmp_path / "deep" / "merged") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# ---- The command line itself ----


def test_the_documentation_names_the_default_learning_rates():
    from peft.cli.train import LEARNING_RATES

    text = DOCS.read_text(encoding="utf-8")
    for method, rate in LEARNING_RATES.items():
        if method == "sm3":
            assert f"({rate} with `sm3`)" in text
        else:
            assert re.search(rf"^\| \[`{method}`\].*\| {rate}[ |]", text, re.M)


def test_help_is_quick():
    """Nothing heavy is imported to say what the options are."""
    code = (
        "import sys; from peft.cli import arguments; arguments.make_parser().format_help()\n"
        "print({'torch', 'transformers', 'matplotlib', 'reasoning_gym'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
