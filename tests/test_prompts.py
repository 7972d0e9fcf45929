"""The prompt methods: what goes into the model and where, against the base model with hand-made inputs, in float64.

Letters: B rows, T virtual tokens, L tokens, D width.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, bert, gpt2, llama, make_tokenizer, opt, tokens
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
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

T = 4
METHODS = {
    "prompt": lambda **kw: PromptTuningConfig(**{"num_virtual_tokens": T, **kw}),
    "multitask": lambda **kw: MultitaskPromptTuningConfig(**{"num_virtual_tokens": T, "num_tasks": 3, **kw}),
    "p_mlp": lambda **kw: PromptEncoderConfig(**{"num_virtual_tokens": T, "encoder_hidden_size": 6, **kw}),
    "p_lstm": lambda **kw: PromptEncoderConfig(
        **{"num_virtual_tokens": T, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM", **kw}
    ),
    "prefix": lambda **kw: PrefixTuningConfig(**{"num_virtual_tokens": T, **kw}),
    "prefix_projection": lambda **kw: PrefixTuningConfig(
        **{"num_virtual_tokens": T, "prefix_projection": True, "encoder_hidden_size": 6, **kw}
    ),
    "cpt": lambda **kw: CPTConfig(
        **{"cpt_token_ids": [7, 8, 9, 10], "cpt_tokens_type_mask": [1, 2, 3, 4], "opt_projection_epsilon": 9.0,
           "opt_projection_format_epsilon": 9.0, **kw}
    ),
}  # fmt: skip
PREFIX = ("prefix", "prefix_projection")
COMPUTED = ("p_mlp", "p_lstm", "prefix_projection")
methods = pytest.mark.parametrize("method", METHODS)
causal = pytest.mark.parametrize("make", [llama, gpt2, opt], ids=["llama", "gpt2", "opt"])


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50)).eval()


def t5(**kw) -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, **kw)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    model.generation_config.decoder_start_token_id = 0
    return model


def bart() -> BartForConditionalGeneration:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return BartForConditionalGeneration(
        BartConfig(vocab_size=50, d_model=16, max_position_embeddings=64, **sizes)
    ).eval()


def spread(model):
    """Far apart, so that no choice and no comparison hangs on rounding."""
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def prompted(base, method: str, *names: str, task_type="CAUSAL_LM", **kw) -> PeftModel:
    """Trained adapters in float64; the first is active."""
    names = names or ("default",)
    model = get_peft_model(base, METHODS[method](task_type=task_type, **kw), names[0])
    for name in names[1:]:
        model.add_adapter(name, METHODS[method](task_type=task_type, **kw))
    for name in names:
        for _, parameter in model.prompt_encoder.adapter_tensors(name):
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model.double().eval()


def tasks(method: str, rows: int) -> dict:
    return {"task_ids": torch.arange(rows) % 3} if method == "multitask" else {}


def by_hand(model: PeftModel, method: str, name: str, ids: torch.Tensor, mask: torch.Tensor, task: int = 0):
    """The base model's logits of one causal row without padding: its prompt put in front by the model's own means."""
    base, encoder = model.get_base_model(), model.prompt_encoder[name]
    ids = ids[mask.bool()].unsqueeze(0)
    if method in PREFIX:
        config = model.peft_config[name]
        flat = encoder(torch.arange(T))
        cache = DynamicCache()
        pairs = flat.view(1, T, config.num_layers * 2, config.num_attention_heads, -1).permute(2, 0, 3, 1, 4)
        for layer in range(config.num_layers):
            cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
        return base(input_ids=ids, past_key_values=cache).logits[0]
    prompt = encoder(torch.arange(T))
    if method == "multitask":
        prompt = prompt * (encoder.prefix_task_cols[task] @ encoder.prefix_task_rows[task])
    embeds = torch.cat([prompt.unsqueeze(0), base.get_input_embeddings()(ids)], dim=1)
    return base(inputs_embeds=embeds).logits[0]


def padded_batch(side: str, rows: int = 3, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        blank = slice(0, row) if side == "left" else slice(length - row, length)
        mask[row, blank] = 0
    return ids * mask, mask


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
        assert_close(logits[row, virtual:][mask[row].bool()], alone[virtual:], rtol=1e-8, atol=1e-8)


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
        assert_close(mixed[row][kept], alone[0, -6:][kept], rtol=1e-8, atol=1e-8)


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
    assert_close(found, expected, rtol=1e-7, atol=1e-7)
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
    """Greedy search by whole forward passes."""
    for _ in range(steps):
        last = model(input_ids=ids, attention_mask=mask, **kw).logits[:, -1].argmax(-1, keepdim=True)
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
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=so_far, **tasks(method, 3)).logits[:, -1]
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


# ---- Adapters as objects: what trains, files, initialisations ----


@methods
def test_switching_freezing_and_deleting(method):
    model = prompted(llama(), method, "a", "b")

    def trained() -> set[str]:
        return {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}

    assert model.active_adapter == "a" and trained() == {"a"}
    assert model.active_peft_config.is_prompt_learning and model.peft_config.keys() == {"a", "b"}
    model.set_adapter("b")
    assert model.active_adapters == ["b"] and trained() == {"b"}
    model.set_requires_grad("b", False)
    assert trained() == set()
    model.set_adapter("a")
    with pytest.raises(ValueError, match=r"One prompt can be active at a time, got \['a', 'b'\]"):
        model.set_adapter(["a", "b"])
    with pytest.warns(PeftWarning, match="'b' is active now"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and list(model.prompt_encoder) == ["b"] and trained() == set()
    model.add_adapter("a", METHODS[method](task_type="CAUSAL_LM"))
    model.set_adapter("a")
    assert trained() == {"a"}
    twin = copy.deepcopy(model)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.zero_()
    assert any(parameter.any() for parameter in twin._tuner.prompt_encoder["a"].parameters())
    assert twin._tuner.prompt_encoder is twin.prompt_encoder and twin._tuner.model is twin.base_model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@methods
@torch.no_grad()
def test_files(method, low_cpu_mem_usage, tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model = prompted(base, method, "default", "second").float()
    ids, extra = tokens(), tasks(method, 2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {"prefix_task_cols", "prefix_task_rows"} if method == "multitask" else set()
    assert tensors.keys() == {"prompt_embeddings"} | kept
    assert torch.equal(model.get_prompt_embedding_to_save("default"), tensors["prompt_embeddings"])
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "second"):
        for each in (model, loaded):
            each.set_adapter(name)
        assert_close(loaded(input_ids=ids, **extra).logits, model(input_ids=ids, **extra).logits)
    assert get_peft_model_state_dict(loaded)["prompt_embeddings"].equal(tensors["prompt_embeddings"])
    wide = METHODS[method](task_type="CAUSAL_LM", **(
        {"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, 1]} if method == "cpt" else {"num_virtual_tokens": 9}
    ))  # fmt: skip
    other = get_peft_model(llama(), wide)
    with pytest.raises(RuntimeError, match="size mismatch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # of encoders with a head
        other.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("method", "network"),
    [*((method, "kept") for method in METHODS)]
    + [(method, network) for method in COMPUTED for network in ("lost", "of another prompt")],
)
def test_training_goes_on_from_a_file(method, network, low_cpu_mem_usage, tmp_path, recwarn):
    base = llama()
    fresh = copy.deepcopy(base)
    model = prompted(base, method).float()
    ids, extra = tokens(), tasks(method, 2)
    model.save_pretrained(tmp_path)
    file, computed = tmp_path / "prompt_network.safetensors", method in COMPUTED
    assert file.exists() == computed
    if network != "kept":
        changed = {key: tensor + 1 for key, tensor in load_file(file).items()}
        file.unlink()
        if network == "of another prompt":
            save_file(changed, file)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    warned = [str(w.message) for w in recwarn if "holds the finished prompt" in str(w.message)]
    assert len(warned) == (computed and network != "kept")
    assert_close(loaded(input_ids=ids, **extra).logits, model(input_ids=ids, **extra).logits)
    trained = {key: p for key, p in loaded.named_parameters() if p.requires_grad}
    if network == "kept" and method != "cpt":  # the very same parameters
        theirs = dict(model.named_parameters())
        assert trained.keys() == {key for key, p in theirs.items() if p.requires_grad}
        assert all(torch.equal(p, theirs[key]) for key, p in trained.items())
    loaded(input_ids=ids, labels=ids, **extra).loss.backward()
    assert trained and all(p.grad.any() for p in trained.values())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / file.name).exists() == (computed and network == "kept")
    loaded.save_pretrained(tmp_path)
    assert file.exists() == (computed and network == "kept")  # what does not make this prompt is taken away


def test_cpt_training_goes_on_within_the_bounds(tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model = prompted(base, "cpt", opt_projection_epsilon=0.4, opt_projection_format_epsilon=0.8).float()
    model.get_prompt(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    encoder, own = loaded.prompt_encoder["default"], model.prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, base.get_input_embeddings().weight[7:11])
    assert_close(encoder.delta_embedding.weight[:3], own.delta_embedding.weight[:3], atol=1e-6, rtol=1e-5)


@methods
def test_sizes_are_those_of_the_model(method):
    model = prompted(
        Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=12, intermediate_size=24)), method
    )
    config = model.peft_config["default"]
    heads, width = (1, 12) if method in PREFIX else (2, 16)
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (2, heads, width)
    assert (
        config.num_transformer_submodules == 1 and model(input_ids=tokens(), **tasks(method, 2)).logits.isfinite().all()
    )


def test_prefixes_go_into_the_decoder():
    """Its layers, its heads and their size, which need not be the width of the model."""
    model = prompted(t5(num_decoder_layers=3), "prefix", task_type="SEQ_2_SEQ_LM")
    config = model.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (3, 2, 16)
    assert model(input_ids=tokens(), labels=tokens()).loss.isfinite()


def test_initialisations(tmp_path):
    base = llama(vocab_size=300)
    words = base.get_input_embeddings().weight
    make_tokenizer().save_pretrained(tmp_path)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abcde", "tokenizer_name_or_path": str(tmp_path)}
    ids = make_tokenizer()("abcde")["input_ids"]
    for number in (3, 12):
        for method in ("prompt", "multitask"):
            model = get_peft_model(copy.deepcopy(base), METHODS[method](num_virtual_tokens=number, **text))
            expected = words[torch.tensor((ids * 5)[:number])]
            assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)
    model = get_peft_model(copy.deepcopy(base), METHODS["prompt"](prompt_tuning_init="sample_vocab"))
    start = model.prompt_encoder["default"].embedding.weight
    assert all((row == words).all(1).any() for row in start) and len({tuple(row.tolist()) for row in start}) > 1
    for projection in (False, True):
        config = PrefixTuningConfig(num_virtual_tokens=T, init_weights="zero", prefix_projection=projection)
        assert not get_peft_model(llama(), config).get_prompt(1).layers[0].keys.any()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_multitask_starts_from_source_tasks(form, tmp_path):
    source = get_peft_model(llama(), METHODS["multitask"](num_ranks=2))
    tensors = {key: torch.randn_like(tensor) for key, tensor in get_peft_model_state_dict(source).items()}
    path = str(tmp_path / f"source.{form}")
    save_file(tensors, path) if form == "safetensors" else torch.save(tensors, path)
    cols = tensors["prefix_task_cols"]
    for init, expected in (
        ("AVERAGE_SOURCE_TASKS", cols.mean(0)),
        ("EXACT_SOURCE_TASK", cols[2]),
        ("ONLY_SOURCE_SHARED", None),
    ):
        config = METHODS["multitask"](prompt_tuning_init=init, prompt_tuning_init_state_dict_path=path,
                                      prompt_tuning_init_task=2, num_tasks=2, num_ranks=2)  # fmt: skip
        encoder = get_peft_model(llama(), config).prompt_encoder["default"]
        assert torch.equal(encoder.embedding.weight, tensors["prompt_embeddings"])
        for task in (0, 1):
            assert expected is None or torch.equal(encoder.prefix_task_cols[task], expected)
    config.num_virtual_tokens = 5
    with pytest.raises(
        ValueError, match=r"prompt_embeddings of .* has the shape \(4, 16\), the configuration wants \(5, 16\)"
    ):
        get_peft_model(llama(), config)


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
    optimizer = torch.optim.AdamW(model.prompt_encoder.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
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
        (lambda: PrefixTuningConfig(init_weights="one"), "init_weights must be None or 'zero', got 'one'"),
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
