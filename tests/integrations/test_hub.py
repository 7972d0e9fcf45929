"""Uploading adapters to the hub and loading them from there, by this package, by transformers' mixin and by Trainer.

The hub is a folder on disk: the methods of `HfApi` that the libraries call write into it and read from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import CONFIGS, adapted, llama, logits, methods, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel

ADDRESS = "https://huggingface.co/"


class LocalHub:
    """What `HfApi` does, in a folder; `calls` keeps the arguments."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.calls = root, {}
        for name in ("create_repo", "upload_folder", "create_commit", "hf_hub_download"):
            method = getattr(self, name)
            monkeypatch.setattr(HfApi, name, lambda _, *args, method=method, **kw: method(*args, **kw))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)

    def create_repo(self, repo_id: str, **kw) -> RepoUrl:
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / repo_id).mkdir(parents=True, exist_ok=kw["exist_ok"])
        self.calls["create_repo"] = kw
        return RepoUrl(ADDRESS + repo_id)

    def _commit(self, repo_id: str, name: str, kw: dict) -> CommitInfo:
        self.calls[name] = kw
        message = kw.get("commit_message") or ""
        return CommitInfo(f"{ADDRESS}{repo_id}/commit/1", message, "", "1", pr_url=None)

    def upload_folder(self, repo_id: str, folder_path, **kw) -> CommitInfo:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return self._commit(repo_id, "upload_folder", kw)

    def create_commit(self, repo_id: str, operations, **kw) -> CommitInfo:
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.root / repo_id / operation.path_in_repo)
        return self._commit(repo_id, "create_commit", kw)

    def hf_hub_download(self, repo_id: str, filename: str, subfolder: str | None = None, **kw) -> str:
        path = self.root / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        self.calls["hf_hub_download"] = kw
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> LocalHub:
    return LocalHub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def folder(tmp_path) -> str:
    llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def files(hub: LocalHub, repo: str) -> set[str]:
    return {path.name for path in (hub.root / repo).iterdir()}


@methods
def test_a_model_is_uploaded_and_loaded(method, hub, folder):
    base, ids = AutoModelForCausalLM.from_pretrained(folder), tokens()
    model = adapted(base, "default", "other", method=method, task_type="CAUSAL_LM")
    address = model.push_to_hub("me/adapter", private=True, revision="new", commit_message="an adapter")
    assert address == f"{ADDRESS}me/adapter/commit/1"
    assert files(hub, "me/adapter") == {"adapter_config.json", "adapter_model.safetensors", "README.md", "other"}
    assert hub.calls["create_repo"]["private"] is True
    upload = hub.calls["upload_folder"]
    assert (upload["revision"], upload["commit_message"]) == ("new", "an adapter")

    assert PeftConfig.from_pretrained("me/adapter").base_model_name_or_path == folder
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), "me/adapter", revision="new")
    assert hub.calls["hf_hub_download"]["revision"] == "new"
    again.load_adapter("me/adapter", "other", subfolder="other")
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again, ids), logits(model, ids))
    model.set_adapter("default")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter"), ids), logits(model, ids))


def test_saving_uploads_when_it_is_asked_to(hub, folder, tmp_path):
    model = adapted(AutoModelForCausalLM.from_pretrained(folder))
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved")
    assert files(hub, "me/saved") == {path.name for path in (tmp_path / "saved").iterdir()}
    LoraConfig(r=3).push_to_hub("me/config")
    assert files(hub, "me/config") == {"adapter_config.json"}
    assert PeftConfig.from_pretrained("me/config").r == 3
    with pytest.raises(ValueError, match="adapter_model.safetensors.* at .me/config"):
        PeftModel.from_pretrained(model.unload(), "me/config")


@methods
def test_an_injected_adapter_is_uploaded_by_transformers(method, hub, folder):
    base, ids = AutoModelForCausalLM.from_pretrained(folder), tokens()
    base.add_adapter(CONFIGS[method](target_modules=["q_proj", "v_proj"]))
    base.push_to_hub("me/injected")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files(hub, "me/injected")
    assert "model.safetensors" not in files(hub, "me/injected")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), "me/injected")
    assert torch.equal(logits(again, ids), logits(base.eval(), ids))


def test_trainer_uploads_the_adapter_alone(hub, folder, tmp_path):
    model, ids = adapted(AutoModelForCausalLM.from_pretrained(folder), task_type="CAUSAL_LM"), tokens(4)
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, push_to_hub=True,
        hub_model_id="me/trained", hub_strategy="end",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    trainer.push_to_hub()
    names = files(hub, "me/trained")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert "model.safetensors" not in names
    assert "library_name: peft" in (hub.root / "me/trained/README.md").read_text(encoding="utf-8")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), "me/trained")
    assert torch.equal(logits(again, ids), logits(model.eval(), ids))
