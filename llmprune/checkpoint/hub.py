"""The Hub: may I push there, asked before the hours of work, and the push itself.

A saved model is never lost to a failed push: it stays where it was saved, and the error says which command sends it
again (unchanged files are skipped then). The commit that brings the new weights deletes older weight files of the
repository, because a leftover `model.safetensors` would be loaded in place of new shards, without a word.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from llmprune.errors import HubError, UserError

__all__ = ["check_access", "push"]

# Connection errors are not OSErrors; they share this base of the HTTP library, httpx or httpx2, that the client uses.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

_IGNORED = [".*", "*/.*", "*.tmp", "**/__pycache__/**", "__pycache__/**"]
_OLD_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]


def check_access(repo_id: str | None, default_name: str, token: str | None = None) -> str:
    """The full "namespace/name" to push to, after asking the Hub who we are and whether we may write there.

    Without `repo_id` it is `default_name` in one's own namespace; a bare name is put there too. A fine-grained token's
    rights cannot be known for a repository that does not exist yet.

    Raises
    ------
    UserError
        if the name is not one that the Hub allows.
    HubError
        if there is no valid token, it may only read, or the namespace or repository is not ours to write to.
    """
    api = HfApi(token=token)
    name = repo_id or default_name
    _check_name(name)
    with _translated("The Hub does not let you push", "run `hf auth login` with a token that may write", token):
        try:
            me = api.whoami()
        except LocalTokenNotFoundError:
            raise HubError(
                "Pushing needs a Hub token that may write, and there is none: run `hf auth login` or set HF_TOKEN."
            ) from None
    full = name if "/" in name else f"{me['name']}/{name}"
    namespaces = [me["name"], *(org["name"] for org in me.get("orgs", ()))]
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            "Your Hub token may only read, so nothing can be pushed: run `hf auth login` with one that may write."
        )
    if full.split("/")[0] not in namespaces:
        raise HubError(
            f"You cannot push to {full}: the token belongs to {me['name']}, who may write to {', '.join(namespaces)}."
        )
    refused = _translated(f"You cannot push to {full}", "choose another name or a token that may write there", token)
    with refused, suppress(RepositoryNotFoundError):  # not found is the usual case: the push will make it
        api.auth_check(full, write=True)
    return full


def push(directory: Path, repo_id: str, *, private: bool, token: str | None = None) -> str:
    """Upload the checkpoint in `directory` to `repo_id`, made if it does not exist, and return its address.

    `private` counts for a repository that is made now; an existing one keeps its visibility.

    Raises
    ------
    HubError
        if the Hub refuses or breaks off. The directory is untouched.
    """
    again = shlex.join(["hf", "upload", repo_id, str(directory), ".", *(["--private"] if private else [])])
    for pattern in _OLD_WEIGHTS:
        again += f" --delete {shlex.quote(pattern)}"
    cure = f"the model is safe in {directory}; send it again with `{again}`"
    api = HfApi(token=token)
    with _translated(f"The push to {repo_id} failed", cure, token):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message="Upload a model pruned with llmprune",
            ignore_patterns=_IGNORED,
            delete_patterns=_OLD_WEIGHTS,
        )
    return str(address)


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is no name for a Hub repository: it is name or namespace/name, of letters, digits, '-', '_' and "
            "'.', at most 96 characters (write 2of4 for 2:4)."
        ) from error


@contextmanager
def _translated(what: str, cure: str, token: str | None) -> Iterator[None]:
    """One HubError for the client's families of exceptions: HTTP, network, Xet (OSError), LFS (RuntimeError), card."""
    try:
        yield
    except (_HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{what}: {_reason(error, token)}; {cure}.") from error


def _reason(error: BaseException, token: str | None) -> str:
    """The cause in one line. An LFS failure hides it in `__cause__`."""
    root = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    said = root.server_message if isinstance(root, HfHubHTTPError) and root.server_message else str(root)
    line = " ".join(said.split()).rstrip(".") or type(root).__name__
    if token:
        line = line.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", line)
