"""May I push there? Asked before the hours of work, not after them.

The push itself is in push.py.
"""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from llmprune.checkpoint.refusal import translated
from llmprune.errors import HubError, UserError

__all__ = ["Destination", "check_access", "limit_patience"]

PATIENCE = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "5", "HF_XET_CLIENT_RETRY_BASE_DELAY": "2s"}
"""Xet's retries, where its user has not set them: a minute. Its own 3 s, to the powers of 1 to 5, make six."""


@dataclass(frozen=True)
class Destination:
    """Where on the Hub a checkpoint goes.

    repo_id : namespace/name; "name" and "" only until `check_access` has made it whole
    private : whether a repository that is made now is private; an existing one keeps its visibility
    revision : the branch, made from main if there is none; None: main
    create_pr : open a pull request against main, in place of a commit to it
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        if self.create_pr and self.revision is not None:
            raise UserError(
                "A pull request is opened against main, on a branch that the Hub makes: give a revision or ask for a "
                f"pull request, not both; got revision {self.revision!r}."
            )

    @property
    def is_pull_request(self) -> bool:
        """Whether it goes to a pull request, a new one or one that is open."""
        return self.create_pr or (self.revision or "").startswith("refs/pr/")

    def command(self, directory: Path) -> str:
        """What a person types to push `directory` there."""
        words = ["llmprune", "push", str(directory), self.repo_id]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision is not None else []
        words += ["--create-pr"] if self.create_pr else []
        return shlex.join(words)


def limit_patience() -> bool:
    """Let hf_xet give up on a storage that does not answer within a minute, and not after many: whether it will.

    It reads its settings from the environment when the first transfer begins, up or down. What is set already stays.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    return all(os.environ[name] == value for name, value in PATIENCE.items())


def check_access(asked: Destination, default_name: str, *, token: str | None = None) -> Destination:
    """`asked` with its name in full, "namespace/name", after asking the Hub who we are and whether we may write there.

    Without a name it is `default_name` in one's own namespace; a bare name is put there too. A pull request may go to
    any repository that we see. A fine-grained token's rights cannot be known for a repository that does not exist yet.

    Raises
    ------
    UserError
        if the name is not one that the Hub allows.
    HubError
        if there is no valid token, it may only read, the namespace or repository is not ours to write to, or it is to
        be private and is public.
    """
    limit_patience()
    api = HfApi(token=token)
    name = asked.repo_id or default_name
    _check_name(name)
    with translated("The Hub does not let you push", "be online, with a token that may write (`hf auth login`)", token):
        me = api.whoami()
    full = name if "/" in name else f"{me['name']}/{name}"
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            "Your Hub token may only read, so nothing can be pushed: run `hf auth login` with one that may write."
        )
    with translated(f"You cannot push to {full}", "choose another name or a token that may write there", token):
        _check_repository(api, replace(asked, repo_id=full), me)
    return replace(asked, repo_id=full)


def _check_repository(api: HfApi, to: Destination, me: dict[str, Any]) -> None:
    namespaces = [me["name"], *(org["name"] for org in me.get("orgs", ()) if org.get("roleInOrg") != "read")]
    if to.repo_id.split("/")[0] not in namespaces:
        if not to.is_pull_request:
            raise HubError(
                f"You cannot push to {to.repo_id}: the token belongs to {me['name']}, who may write to "
                f"{', '.join(namespaces)}. A pull request to a repository that exists needs no more (--create-pr)."
            )
        api.repo_info(to.repo_id)
        return
    with suppress(RepositoryNotFoundError):  # not found is the usual case: the push will make it
        api.auth_check(to.repo_id, write=True)
        if to.private and not api.repo_info(to.repo_id).private:
            raise HubError(
                f"{to.repo_id} exists and is public, and a push changes nothing about that: make it private on the "
                "Hub, or choose another name."
            )


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is no name for a Hub repository: it is name or namespace/name, of letters, digits, '-', '_' and "
            "'.', at most 96 characters (write 2of4 for 2:4)."
        ) from error
