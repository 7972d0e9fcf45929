"""Signatures that follow the base model's, and what is said when a file cannot be got."""

from __future__ import annotations

import copy
import inspect
import pickle

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tiny_models import adapted, llama, logits, tokens

from peft import LoraConfig, PeftModel
from peft.config import find_file
from peft.helpers import update_signature
from peft.utils.save_and_load import load_peft_weights


def test_signatures_in_copies_call_the_copy():
    model, ids = adapted(llama()), tokens()
    base = model.get_base_model()
    for _ in range(2):  # once more changes nothing
        update_signature(model)
    expected = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(other.forward) == inspect.signature(base.forward)
        assert inspect.signature(other.generate) == inspect.signature(base.generate)
        assert other.forward.__doc__ == base.forward.__doc__
        assert torch.equal(logits(other, ids), expected)
        for parameter in other.parameters():
            parameter.data.zero_()
        assert not logits(other, ids).any()
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(other.generate(ids, max_new_tokens=2)[:, -2:], torch.zeros(2, 2, dtype=torch.int64))


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers every question for a file with an error, which the test sets."""
    answers: dict[str, Exception | str] = {}

    def download(repo, filename, **kwargs):
        answer = answers.get(filename, EntryNotFoundError("404"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return answers


def test_an_unreachable_hub_is_named(hub):
    offline = LocalEntryNotFoundError("outgoing traffic has been disabled")
    hub["adapter_config.json"] = offline
    with pytest.raises(ValueError, match="could not be asked .outgoing traffic has been disabled") as error:
        LoraConfig.from_pretrained("someone/adapter")
    assert error.value.__cause__ is offline
    with pytest.raises(ValueError, match="could not be asked"):
        PeftModel.from_pretrained(llama(), "someone/adapter")
    assert find_file("someone/adapter", "adapter_config.json") is None
    hub["adapter_config.json"] = EntryNotFoundError("404")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'someone/adapter'$"):
        LoraConfig.from_pretrained("someone/adapter")


def test_what_is_in_the_cache_is_found_offline(hub, tmp_path):
    """Without a connection the hub's cache cannot say that a file is not there, only that it does not have it."""
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    offline = LocalEntryNotFoundError("no connection")
    hub.update({"adapter_model.safetensors": offline, "adapter_model.safetensors.index.json": offline})
    hub["adapter_model.bin"] = str(tmp_path / "adapter_model.bin")
    assert torch.equal(load_peft_weights("someone/adapter", device="cpu")["a"], torch.ones(2))
    hub["adapter_model.bin"] = offline
    with pytest.raises(ValueError, match="Can't find adapter weights .*no connection"):
        load_peft_weights("someone/adapter", device="cpu")
