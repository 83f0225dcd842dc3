"""May I push there? The Hub's client, acted."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from llmprune.checkpoint.hub import PATIENCE, Destination, check_access, limit_patience
from llmprune.errors import HubError, UserError
from tests.checkpoint.test_refusal import TOKEN, http_error


class Hub:
    """Answers for HfApi's methods. An exception as an answer is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, Any] = {
            "whoami": {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}},
            "auth_check": None,
            "repo_info": SimpleNamespace(private=False),
        }
        for method in self.answers:
            monkeypatch.setattr(HfApi, method, self._act(method))

    def _act(self, method: str) -> Any:
        def answer(api: HfApi, *args: Any, **kwargs: Any) -> Any:
            self.calls[method] = {"args": args, "token": api.token, **kwargs}
            if isinstance(self.answers[method], Exception):
                raise self.answers[method]
            return self.answers[method]

        return answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    for name in PATIENCE:
        monkeypatch.setenv(name, "restored")  # so that what the tests set is undone
    return Hub(monkeypatch)


@pytest.mark.parametrize(
    ("repo_id", "full"), [("", "ada/m-2of4"), ("mine", "ada/mine"), ("lab/mine", "lab/mine"), ("ada/x", "ada/x")]
)
def test_the_name_in_full(hub: Hub, repo_id: str, full: str) -> None:
    asked = Destination(repo_id, revision="v1")
    assert check_access(asked, "m-2of4", token=TOKEN) == Destination(full, revision="v1")
    assert hub.calls["auth_check"]["args"] == (full,)
    assert hub.calls["auth_check"]["write"] is True
    assert hub.calls["whoami"]["token"] == TOKEN


def test_a_repository_that_does_not_exist_yet_is_fine(hub: Hub) -> None:
    hub.answers["auth_check"] = http_error(RepositoryNotFoundError, "404", status=404)
    assert check_access(Destination("new", private=True), "m").repo_id == "ada/new"


@pytest.mark.parametrize("name", ["m-2:4", "a/b/c", "-x", "m" * 97])
def test_a_name_that_the_hub_forbids(hub: Hub, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a Hub repository"):
        check_access(Destination(name), "m")
    assert hub.calls == {}


def test_a_token_that_may_only_read(hub: Hub) -> None:
    hub.answers["whoami"]["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(HubError, match="may only read"):
        check_access(Destination("m"), "m")


def test_an_organisation_in_which_one_may_only_read(hub: Hub) -> None:
    hub.answers["whoami"]["orgs"].append({"name": "museum", "roleInOrg": "read"})
    with pytest.raises(HubError, match="may write to ada, lab"):
        check_access(Destination("museum/m"), "m")


def test_somebody_elses_namespace_takes_a_pull_request_only(hub: Hub) -> None:
    with pytest.raises(HubError, match="belongs to ada, who may write to ada, lab"):
        check_access(Destination("bob/m"), "m")
    assert check_access(Destination("bob/m", create_pr=True), "m").repo_id == "bob/m"
    assert check_access(Destination("bob/m", revision="refs/pr/3"), "m").repo_id == "bob/m"
    hub.answers["repo_info"] = http_error(RepositoryNotFoundError, "404", status=404)
    with pytest.raises(HubError, match="You cannot push to bob/m: the repository does not exist"):
        check_access(Destination("bob/m", create_pr=True), "m")


def test_a_repository_that_may_not_be_written(hub: Hub) -> None:
    hub.answers["auth_check"] = http_error(HfHubHTTPError, "read only", status=403)
    with pytest.raises(HubError, match=r"You cannot push to lab/m: the Hub forbids it \(read only\)"):
        check_access(Destination("lab/m"), "m")


def test_private_is_not_what_a_public_repository_becomes(hub: Hub) -> None:
    with pytest.raises(HubError, match="lab/m exists and is public"):
        check_access(Destination("lab/m", private=True), "m")
    hub.answers["repo_info"] = SimpleNamespace(private=True)
    assert check_access(Destination("lab/m", private=True), "m").private


def test_a_pull_request_is_not_to_a_branch() -> None:
    with pytest.raises(UserError, match="give a revision or ask for a pull request, not both; got revision 'v1'"):
        Destination("a/b", revision="v1", create_pr=True)


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        (Destination("a/b"), "llmprune push '/home/ada/my model' a/b"),
        (Destination("a/b", True, "v1"), "llmprune push '/home/ada/my model' a/b --private --revision v1"),
        (Destination("a/b", create_pr=True), "llmprune push '/home/ada/my model' a/b --create-pr"),
    ],
)
def test_the_command_that_pushes_there(to: Destination, expected: str) -> None:
    assert to.command(Path("/home/ada/my model")) == expected


def test_xets_patience_is_limited_unless_its_user_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PATIENCE:
        monkeypatch.setenv(name, "to be undone")
        monkeypatch.delenv(name)
    assert limit_patience()
    assert {name: os.environ[name] for name in PATIENCE} == PATIENCE
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "9s")
    assert not limit_patience()
    assert os.environ["HF_XET_CLIENT_RETRY_BASE_DELAY"] == "9s"
