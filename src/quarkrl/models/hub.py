"""Upload a model to the Hugging Face hub."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from quarkrl.errors import UserError, one_line
from quarkrl.models import model_card, quark_json

END_OF_TRAINING = "End of training"  # The message of the commit, as that of Trainer.

# The base class of its errors belongs to its HTTP client, which depends on its version.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def create_repository(name: str, private: bool | None = None, token: str | None = None) -> str:
    """Create a repository on the hub, unless it exists; return its full name, with the owner.

    Args:
        name: `OWNER/NAME`, or `NAME` for the owner of the token.
        private: whether a new repository is private; None for the owner's default.
        token: of the hub; by default that of `HF_TOKEN` or of `hf auth login`.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    if not (token or get_token()):
        raise UserError(f"hub {name!r}: must have a token to upload with. Set HF_TOKEN, or run `hf auth login`.")
    with _hub_errors(name):
        return HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id


def push_directory(
    directory: str | os.PathLike,
    name: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
) -> str:
    """Upload a model's directory as one commit; a missing repository is created.

    The model card names the repository in its code. Of local paths in `quark.json`, only the last part is uploaded.

    Args:
        directory: `final/` of a run, or an exported model.
        name, private, token: see `create_repository`.
        revision: the branch, which is created if it is missing; None for the main one.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    api, root = HfApi(token=token), Path(directory)
    repository = create_repository(name, private, token)
    files: dict[str, Any] = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    if card := files.get(model_card.FILE_NAME):
        text = card.read_text(encoding="utf-8").replace(model_card.PLACEHOLDER, repository)
        files[model_card.FILE_NAME] = text.encode()
    if (facts := quark_json.read_quark_json(root)) is not None:
        files[quark_json.FILE_NAME] = json.dumps(_without_places(facts), indent=2).encode()
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
    with _hub_errors(name):
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return str(api.create_commit(repository, operations, commit_message=message, revision=revision).commit_url)


def _without_places(value: Any) -> Any:
    """A value of JSON in which absolute paths are reduced to their last part."""
    if isinstance(value, dict):
        return {name: _without_places(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Report errors of the hub as errors of the user."""
    try:
        yield
    except (OSError, ValueError, _HTTP_ERROR) as error:
        raise UserError(
            f"hub {name!r}: {one_line(error)}. Check the name, the token (HF_TOKEN) and the network."
        ) from error
