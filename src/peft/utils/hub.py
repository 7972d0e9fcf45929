"""Uploading of anything that has `save_pretrained` to the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile

from .constants import PROMPT_NETWORK_NAME


def push_to_hub(obj, repo_id: str, *, save_kwargs: dict | None = None, **upload_kwargs) -> str:
    """`obj.save_pretrained(folder, **save_kwargs)` into a temporary folder, and `upload_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        obj.save_pretrained(folder, **(save_kwargs or {}))
        upload_kwargs.setdefault("commit_message", f"Upload {type(obj).__name__}")
        return upload_folder(folder, repo_id, **upload_kwargs)


def upload_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder to the hub, without what prompts are computed from.

    Args:
        repo_id: `user/name`; the repository is created if need be.
        commit_message, private, token, revision, create_pr: as in `huggingface_hub`.

    Returns:
        The URL of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns=f"*{PROMPT_NETWORK_NAME}",  # for training, not for use, and it may be a hundred times as large
        commit_message=commit_message or "Upload adapter",
        revision=revision,
        create_pr=create_pr,
    )
    return commit.commit_url
