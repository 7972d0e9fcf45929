"""The prompt methods: what goes into the model and where, against the base model with hand-made inputs, in float64.

Letters: B rows, T virtual tokens, L tokens, D width.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from prompt_models import (
    METHODS,
    PREFIX,
    T,
    bart,
    bloom,
    by_hand,
    causal,
    methods,
    padded_batch,
    prompted,
    spread,
    t5,
    tasks,
)
from tiny_models import SIZES, bert, gpt2, llama, losses_of_training, tokens
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import peft
from peft import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.utils.warning import PeftWarning

# Llama's and T5's norms go through float32 in a float64 model too: where two ways of computing differ by the last digit
# of float64, a number may be rounded up there in the one and down in the other.
assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)

# ---- Forward ----


@pytest.mark.parametrize("side", ["left", "right"])
@causal
@methods
@torch.no_grad()
def test_every_row_is_as_alone(method, make, side):
    """Padding on either side, and the prompt put in front by hand."""
    model = prompted(make(), method)
    ids, mask = padded_batch(side)
    logits = model(input_ids=ids, attention_mask=mask, **tasks(method, 3)).logits
    virtual = 0 if method in PREFIX else T
    assert logits.shape[1] == virtual + 6
    for row in range(3):
        alone = by_hand(model, method, "default", ids[row], mask[row], task=row)
        assert_close(logits[row, virtual:][mask[row].bool()], alone[virtual:])


@methods
@torch.no_grad()
def test_mixed_batch(method):
    """Rows of adapters with prompts of different lengths, and of the base model, with padding."""
    kw = {} if method == "cpt" else {"num_virtual_tokens": 2}
    model = prompted(llama(), method, "a")
    short = METHODS[method](task_type="CAUSAL_LM", **kw)
    model.add_adapter("b", short)
    model.double().eval()
    for parameter in model.prompt_encoder["b"].parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids, mask = padded_batch("left", rows=4)
    names = ["b", "__base__", "a", "b"]
    extra = tasks(method, 4)
    mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names, **extra).logits[:, -6:]
    for row, name in enumerate(names):
        own = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        if name == "__base__":
            own["position_ids"] = (own["attention_mask"].cumsum(1) - 1).clamp(min=0)
            alone = model.get_base_model()(**own).logits
        else:
            model.set_adapter(name)
            alone = model(**own, **{key: value[row : row + 1] for key, value in extra.items()}).logits
        kept = mask[row].bool()
        assert_close(mixed[row][kept], alone[0, -6:][kept])


@methods
def test_gradients(method):
    """Of everything that trains, and of nothing else, against autograd over the model by hand."""
    model = prompted(llama(), method)
    ids, mask = tokens(2), torch.ones(2, 5, dtype=torch.long)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} <= {id(p) for p in model.prompt_encoder.parameters()}
    weights = torch.randn(2, 5, 50).double()
    found = torch.autograd.grad((model(input_ids=ids, **tasks(method, 2)).logits[:, -5:] * weights).sum(), trained)
    rows = [by_hand(model, method, "default", ids[row], mask[row], task=row)[-5:] for row in range(2)]
    expected = torch.autograd.grad((torch.stack(rows) * weights).sum(), trained)
    assert_close(found, expected)
    assert all(gradient.any() for gradient in found)


@methods
def test_disabled_and_unloaded_it_is_the_base_model(method):
    base = llama()
    ids = tokens()
    with torch.no_grad():
        expected = base.double()(input_ids=ids).logits
        model = prompted(base, method)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids, **tasks(method, 2)).logits, expected)
        assert not torch.equal(model(input_ids=ids, **tasks(method, 2)).logits[:, -5:], expected)
        assert model.unload() is base and torch.equal(base(input_ids=ids).logits, expected)
    assert not base._forward_pre_hooks and not base._forward_hooks
    with pytest.raises(TypeError, match="cannot be merged"):
        prompted(llama(), method).merge_and_unload()


def test_positions_of_the_user_move_on():
    model = prompted(gpt2(), "prompt")
    ids = tokens()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])  # positions of padding may be anything
    padded = torch.tensor([[0, 1, 2, 3, 4], [7, 6, 0, 1, 2]])
    assert_close(model(input_ids=ids, attention_mask=mask, position_ids=padded).logits[1, -3:],
                 model(input_ids=ids, attention_mask=mask).logits[1, -3:])  # fmt: skip
    positions = torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    found = model(input_ids=ids, position_ids=positions).logits
    prompt, words = model.get_prompt(2), model.get_base_model().get_input_embeddings()(ids)
    moved = torch.cat([torch.arange(T).expand(2, -1), positions + T], dim=1)
    expected = model.get_base_model()(inputs_embeds=torch.cat([prompt, words], 1), position_ids=moved).logits
    assert_close(found, expected)
    assert_close(model(inputs_embeds=words, position_ids=positions).logits, expected)
    assert_close(model(ids, None, None, position_ids=positions).logits, expected)
    with pytest.raises(
        ValueError, match=r"attention_mask must be \(rows, tokens\) with a prompt adapter, got \(2, 1, 5, 5\)"
    ):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 5, 5))


# ---- Tasks ----


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_labels_of_language_models(method):
    model = prompted(llama(), method)
    ids, mask = padded_batch("right")
    labels = ids.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    logits = output.logits[:, -6:]
    if method == "prompt":  # the last virtual token tells the first one of the text
        logits, labels = output.logits[:, T - 1 :], F.pad(labels, (1, 0), value=-100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


CONFIG = BertConfig(**SIZES, intermediate_size=24, num_labels=3)


@pytest.mark.parametrize("method", ["prompt", "multitask", "p_lstm", "prefix"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_tasks_of_encoders(task, method, tmp_path):
    makers = {
        "SEQ_CLS": bert, "TOKEN_CLS": lambda: BertForTokenClassification(CONFIG),
        "QUESTION_ANS": lambda: BertForQuestionAnswering(BertConfig(**SIZES, intermediate_size=24)),
        "FEATURE_EXTRACTION": lambda: BertModel(CONFIG),
    }  # fmt: skip
    base = makers[task]().eval()
    fresh = copy.deepcopy(base)
    model = prompted(base, method, task_type=task)
    assert type(model) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    ids, mask = padded_batch("right")
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(2, (3, 6)), **tasks(method, 3)}
    labels = {
        "SEQ_CLS": {"labels": torch.tensor([0, 2, 1])},
        "TOKEN_CLS": {"labels": torch.randint(3, (3, 6)).masked_fill(mask == 0, -100)},
        "QUESTION_ANS": {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 2, 2])},
        "FEATURE_EXTRACTION": {},
    }[task]  # fmt: skip
    output = model(**inputs, **labels)
    for row in range(3):  # as without padding
        kept = int(mask[row].sum())
        one = {key: value[row : row + 1, :kept] if value.dim() > 1 else value[row : row + 1]
               for key, value in inputs.items()}  # fmt: skip
        for key, alone in model(**one).items():
            together = output[key][row : row + 1]
            assert_close(together[:, : alone.shape[1]] if alone.dim() > 1 else together, alone)
    if task == "TOKEN_CLS":
        assert_close(output.loss, F.cross_entropy(output.logits[:, -6:].flatten(0, 1), labels["labels"].flatten()))
    if task != "FEATURE_EXTRACTION":
        output.loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.prompt_encoder.parameters() if p.requires_grad)
        head = {"QUESTION_ANS": "qa_outputs"}.get(task, "classifier")
        assert getattr(base, head).modules_to_save["default"].weight.grad.any()
        nn_state = get_peft_model_state_dict(model)
        assert f"base_model.{head}.weight" in nn_state and "prompt_embeddings" in nn_state
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).double()
    for key, value in model(**inputs).items():
        assert_close(loaded(**inputs)[key], value, rtol=1e-5, atol=1e-6)


def test_classification_by_the_last_token_that_is_no_padding():
    config = LlamaConfig(**SIZES, intermediate_size=24, num_labels=3, pad_token_id=0)
    model = prompted(LlamaForSequenceClassification(config).eval(), "prompt", task_type="SEQ_CLS")
    ids, mask = padded_batch("right")
    together = model(input_ids=ids, attention_mask=mask).logits
    for row in range(3):
        assert_close(together[row], model(input_ids=ids[row : row + 1, mask[row].bool()]).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_are_counted_by_the_token_ids(side):
    config = RobertaConfig(**SIZES, intermediate_size=24, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = prompted(RobertaForSequenceClassification(config).eval(), "prompt", task_type="SEQ_CLS")
    ids, mask = padded_batch(side)
    together = model(input_ids=ids, attention_mask=mask).logits
    for row in range(3):
        assert_close(together[row], model(input_ids=ids[row : row + 1, mask[row].bool()]).logits[0])


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "cpt"])
def test_encoder_decoders(method, make):
    """Loss and gradients as one by one without padding; the encoder's prompt comes first."""
    model = prompted(make(), method, task_type="SEQ_2_SEQ_LM")
    ids, mask = padded_batch("right")
    ids[mask == 0] = model.config.pad_token_id
    labels = torch.randint(3, 50, (3, 4))
    output = model(input_ids=ids, attention_mask=mask, labels=labels, **tasks(method, 3))
    lengthened = method == "multitask"
    assert output.logits.shape[1] == 4 + T * lengthened
    for row in range(3):
        one = model(input_ids=ids[row : row + 1, mask[row].bool()], labels=labels[row : row + 1],
                    **{key: value[row : row + 1] for key, value in tasks(method, 3).items()})  # fmt: skip
        assert_close(output.logits[row], one.logits[0])
    assert_close(output.loss, F.cross_entropy(output.logits[:, -4:].flatten(0, 1), labels.flatten()))
    base = model.get_base_model()
    if method in PREFIX:
        return
    prompt = model.get_prompt(3, **tasks(method, 3))
    assert prompt.shape == (3, 2 * T, 16)
    encoder = base.get_encoder()
    words = encoder.get_input_embeddings()
    states = encoder(
        inputs_embeds=torch.cat([prompt[:, :T], words(ids)], 1), attention_mask=F.pad(mask, (T, 0), value=1)
    )
    assert_close(output.encoder_last_hidden_state, states.last_hidden_state)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.prompt_encoder.parameters())


@pytest.mark.parametrize("names", [["a", "b", "a"], ["b", "__base__", "a"]])
@pytest.mark.parametrize("method", ["prompt", "multitask", "prefix"])
def test_mixed_batch_of_encoder_decoders(method, names):
    model = prompted(t5(), method, "a", "b", task_type="SEQ_2_SEQ_LM")
    ids, labels, extra = tokens(3), torch.randint(3, 50, (3, 4)), tasks(method, 3)
    for mask in (None, torch.ones_like(ids)):
        mixed = model(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=names, **extra).logits
        for row, name in enumerate(names):
            one = {"input_ids": ids[row : row + 1], "labels": labels[row : row + 1]}
            if name == "__base__":
                alone = model.get_base_model()(**one).logits
            else:
                model.set_adapter(name)
                alone = model(**one, **{key: value[row : row + 1] for key, value in extra.items()}).logits
            assert_close(mixed[row, -4:], alone[0, -4:])


# ---- Generation ----


def greedy(model, ids, mask, steps, **kw):
    """Greedy search by whole forward passes. Like `generate` it compares float32 numbers, of which two may be equal."""
    for _ in range(steps):
        last = model(input_ids=ids, attention_mask=mask, **kw).logits[:, -1].float().argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, last], 1), F.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2, bloom], ids=["llama", "gpt2", "bloom"])
@methods
def test_generation_is_greedy_search_over_forward(method, make, use_cache):
    model = prompted(spread(make()), method)
    ids, mask = padded_batch("left", length=4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache, "eos_token_id": None}
    found = model.generate(input_ids=ids, attention_mask=mask, **options, **tasks(method, 3))
    assert torch.equal(found, greedy(model, ids, mask, 5, **tasks(method, 3)))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("method", ["prompt", "multitask", "prefix", "p_mlp"])
@pytest.mark.parametrize("make", [t5, bart])
def test_generation_of_encoder_decoders(make, method, use_cache):
    model = prompted(spread(make()), method, task_type="SEQ_2_SEQ_LM")
    ids, mask = padded_batch("right")
    ids[mask == 0] = model.config.pad_token_id
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1, "use_cache": use_cache}
    options |= {"forced_bos_token_id": None, "forced_eos_token_id": None}
    found = model.generate(input_ids=ids, attention_mask=mask, **options, **tasks(method, 3))
    so_far = found[:, :1]
    for _ in range(4):
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=so_far, **tasks(method, 3)).logits
        logits = logits[:, -1].float()  # as `generate` does: two may be equal then
        logits[:, model.config.eos_token_id] = -torch.inf
        so_far = torch.cat([so_far, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, so_far)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["prompt", "multitask", "prefix"])
def test_generation_of_a_mixed_batch(method, beams):
    model = prompted(spread(llama()), method, "a", "b")
    ids, names, extra = tokens(3, 4), ["b", "__base__", "a"], tasks(method, 3)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=names, **options, **extra)
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        if name == "__base__":
            alone = model.get_base_model().generate(input_ids=one, **options)
        else:
            model.set_adapter(name)
            own = {key: value[row : row + 1] for key, value in extra.items()}
            alone = model.generate(input_ids=one, **options, **own)
        assert torch.equal(mixed[row], alone[0])


def test_generation_refuses_what_counts_the_cache():
    model = prompted(llama(), "prompt")
    ids = tokens(1)
    with torch.no_grad():
        used = model(input_ids=ids).past_key_values
    for kw, what in (
        ({"past_key_values": used}, "past_key_values"),
        ({"cache_implementation": "static"}, "a static cache"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"assistant_model": llama()}, "assistant_model"),
    ):
        with pytest.raises(ValueError, match=f"cannot take {what}: the cache holds virtual tokens"):
            model.generate(input_ids=ids, **kw)


@methods
@torch.no_grad()
def test_a_forward_goes_on_from_the_cache(method):
    model = prompted(llama(), method)
    ids, mask = padded_batch("left")
    extra = tasks(method, 3)
    whole = model(input_ids=ids, attention_mask=mask, **extra).logits[:, -2:]
    first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], **extra, use_cache=True)
    rest = model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values, **extra).logits
    assert_close(rest, whole)


# ---- CPT ----


def test_the_loss_of_cpt():
    """Section 4.2 of the paper: labels of all examples count, less the further they are from the text."""
    types = [1, 2, 3, 4, 5, 6, 8, 8]
    fields = {"cpt_token_ids": list(range(10, 18)), "cpt_tokens_type_mask": types, "opt_weighted_loss_type": "decay"}
    model = prompted(llama(), "cpt", opt_loss_decay_factor=0.5, **fields)
    ids = tokens(2, 6)
    text_types = torch.tensor([[1, 2, 2, 3, 4, 4], [1, 1, 2, 3, 3, 4]])
    labels = ids.clone()
    labels[0, 4] = -100
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, input_type_mask=text_types)
    logprobs = output.logits.log_softmax(-1)
    total = count = 0
    for row in range(2):
        sequence = torch.cat([torch.arange(10, 18), ids[row]])
        weights = {3: 0.25, 6: 0.5, 7: 0.5, 13: 1.0, **({12: 1.0} if row == 2 else {})}
        for place, weight in weights.items():
            total, count = total - weight * logprobs[row, place - 1, sequence[place]], count + 1
    assert_close(output.loss, (total / count).to(output.loss), rtol=1e-5, atol=1e-5)
    assert model(ids, labels=labels, input_type_mask=text_types, return_dict=False)[0] == output.loss
    with pytest.raises(ValueError, match="cannot have labels"):
        model.add_adapter("b", METHODS["cpt"](**fields))
        model(input_ids=ids, labels=ids, adapter_names=["default", "b"])


def test_cpt_moves_tokens_within_their_bounds_and_labels_not_at_all():
    model = prompted(llama(), "cpt", opt_projection_epsilon=0.4, opt_projection_format_epsilon=0.8)
    words = model.get_base_model().get_input_embeddings().weight[7:11]
    encoder = model.prompt_encoder["default"]
    encoder.embedding.weight.data.copy_(words)
    moved = (model.get_prompt(1)[0] - words).norm(dim=1)
    scale = (16 / 2048) ** 0.5
    assert_close(moved, scale * torch.tensor([0.8, 0.4, 0.8, 0.0]).double(), check_dtype=False)
    assert_close(encoder.delta_embedding.weight.norm(dim=1), moved)  # where the optimizer goes on from
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert encoder.delta_embedding.weight.grad.abs().sum(1).bool().tolist() == [True, True, True, False]


# ---- With other parts ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_packed_bases(method, bits, tmp_path):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    packing = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packing, dtype=torch.float32)
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM")).train()
    ids = tokens()
    losses = losses_of_training(model, ids, steps=6, lr=0.05)
    assert losses[-1] < losses[0]


def test_a_model_that_does_not_read_the_prompt_says_so(monkeypatch):
    model = prompted(bert(), "prefix", task_type="SEQ_CLS")
    backbone = model.get_base_model().bert
    forward = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda *args, past_key_values=None, **kw: forward(*args, **kw))
    with pytest.raises(RuntimeError, match="has not read the prompt: it does not use its cache"):
        model(input_ids=tokens())


def run(method: str, **kw):
    return prompted(llama(), method)(input_ids=tokens(), **kw)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens must be at least 1, got 0"),
        (lambda: PromptTuningConfig(prompt_tuning_init="best"), "prompt_tuning_init must be one of .* got 'best'"),
        (lambda: PromptTuningConfig(prompt_tuning_init="TEXT"), "needs prompt_tuning_init_text, got None"),
        (lambda: PromptTuningConfig(tokenizer_kwargs={}), "tokenizer_kwargs are for prompt_tuning_init='TEXT'"),
        (lambda: MultitaskPromptTuningConfig(num_ranks=0), "num_ranks must be at least 1, got 0"),
        (lambda: MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK"), "needs prompt_tuning_init_state"),
        (lambda: PromptEncoderConfig(encoder_reparameterization_type="GRU"), "must be one of .* got 'GRU'"),
        (lambda: PromptEncoderConfig(encoder_dropout=1.0), r"encoder_dropout must be in \[0, 1\), got 1.0"),
        (lambda: PrefixTuningConfig(init_weights="one"), "init_weights must be 'zero' or None, got 'one'"),
        (lambda: CPTConfig(task_type="SEQ_CLS"), "CPT is for causal language models"),
        (lambda: CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1]), r"must be of one length, got \[2, 1, 2\]"),
        (lambda: CPTConfig(opt_weighted_loss_type="x"), "must be 'none' or 'decay', got 'x'"),
        (lambda: CPTConfig(opt_projection_epsilon=-1.0), "opt_projection_epsilon must be at least 0, got -1.0"),
        (lambda: get_peft_model(llama(), PromptTuningConfig()), "PromptTuningConfig needs num_virtual_tokens"),
        (lambda: get_peft_model(torch.nn.Linear(2, 2), METHODS["prompt"]()), "need a transformers model"),
        (lambda: run("multitask"), r"needs task_ids, the task of each row \(0 to 2\)"),
        (lambda: run("multitask", task_ids=torch.tensor([0, 3])), r"from 0 to 2, got \[0, 3\]"),
        (lambda: run("prompt", task_ids=torch.tensor([0, 0])), "has one prompt for all"),
        (lambda: run("multitask", task_ids=[0]), "one task per row: got 1 for 2 rows"),
        (lambda: run("prompt", adapter_names=["default"]), "one adapter per row: got 1 for 2 rows"),
        (lambda: run("prompt", adapter_names=[]), "got 0 names"),
        (lambda: run("prompt", position_ids=torch.tensor([[0, 1, 2, 0, 1]])), "Several texts are packed into a row"),
        (lambda: run("prefix", cu_seq_lens_q=torch.tensor([0, 3, 5])), "Several texts are packed into a row"),
        (lambda: run("cpt", labels=tokens(), fused_lm_head=True), "CPT has a loss of its own"),
        (lambda: run("prompt", input_type_mask=tokens()), "input_type_mask is for CPT"),
        (lambda: prompted(llama(), "prompt").add_adapter("b", METHODS["prefix"]()), "of one method"),
    ],
)  # fmt: skip
def test_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_options_of_the_other_network_are_warned_of():
    with pytest.warns(PeftWarning, match="encoder_num_layers=3 and encoder_dropout=0.0 are for the LSTM"):
        get_peft_model(llama(), METHODS["p_mlp"](encoder_num_layers=3))


def test_a_refused_configuration_leaves_no_trace():
    base = llama()
    before = set(vars(base))
    with pytest.raises(ValueError, match="cpt_token_ids must be tokens from 0 to 49"):
        get_peft_model(base, METHODS["cpt"](cpt_token_ids=[1, 2, 3, 50]))
    assert set(vars(base)) == before


def test_memory_is_told_beforehand():
    for method, trained in (("prompt", T * 16), ("prefix", T * 2 * 2 * 8)):  # one key-value head of two
        config = METHODS[method](task_type="CAUSAL_LM")
        for padding in (False, True):
            estimate = peft.estimate_memory(llama().config, config, batch_size=2, sequence_length=8, padding=padding)
            assert estimate.trained == trained and estimate.gpu["activations"] > 0


def test_methods_with_layers_have_no_prompt():
    from tiny_models import adapted

    with pytest.raises(TypeError, match="LORA has no prompt"):
        adapted(llama()).get_prompt(1)
