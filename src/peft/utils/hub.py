"""Uploading of anything that has `save_pretrained` to the Hugging Face hub."""

from __future__ import annotations

import tempfile


def push_to_hub(
    obj,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **save_kwargs,
) -> str:
    """Save `obj` into a temporary folder and upload that folder.

    Args:
        repo_id: `user/name`; the repository is created if need be.
        commit_message, private, token, revision, create_pr: as in `huggingface_hub`.
        save_kwargs: handed to `obj.save_pretrained`.

    Returns:
        The URL of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        obj.save_pretrained(folder, **save_kwargs)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(obj).__name__}",
            revision=revision,
            create_pr=create_pr,
        )
    return commit.commit_url
