"""Upload a repository for `custom_generate` to the Hugging Face Hub."""

from typing import Any

from contralto.decoding.hub.contents import files

__all__ = ["contents_of", "push"]


def contents_of(name: str, repo_id: str) -> dict[str, str]:
    """Return the files that `push` uploads, after checks of the names.

    Args:
        name: a name in `REPOSITORIES`.
        repo_id: `USER/NAME` or `ORGANISATION/NAME` on the Hub.

    Returns:
        Their content, by path.

    Raises:
        ValueError: there is no such repository, or `repo_id` is not an identifier of one.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    contents = files(name, repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id must be USER/NAME or ORGANISATION/NAME, not {repo_id!r}")
    validate_repo_id(repo_id)
    return contents


def push(name: str, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Upload the files of a repository in one commit, and make the repository if there is none.

    Args:
        name: a name in `REPOSITORIES`.
        repo_id: `USER/NAME` or `ORGANISATION/NAME` on the Hub.
        private: whether a new repository is private.
        api: a `huggingface_hub.HfApi`; None for one with the token of `hf auth login` or of `HF_TOKEN`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: there is no such repository, or `repo_id` is not an identifier of one.
        OSError: there is no token, or the Hub does not answer or rejects the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    contents = contents_of(name, repo_id)
    api = api or HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path, text.encode()) for path, text in contents.items()]
    commit = api.create_commit(repo_id, operations, commit_message=f"Write {name} for custom_generate")
    return str(commit.commit_url)
