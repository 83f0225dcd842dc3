"""The Hub's client, acted: what is asked before the work, what is sent, and every way to fail as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from llmprune.checkpoint.hub import check_access, push
from llmprune.errors import HubError, UserError

HTTP = HfHubHTTPError.__bases__[0]  # httpx or httpx2, whichever the client uses
TOKEN = "s3cret-of-an-own-hub"
OTHER = "hf_" + "Secret12" * 4  # stands in the client's message, wherever it came from


def http_error(kind: type[HfHubHTTPError], message: str) -> HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.server_message = None
    return error


class Hub:
    """Answers for HfApi's methods. An exception as an answer is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, Any] = {
            "whoami": {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}},
            "auth_check": None,
            "create_repo": "https://hub/ada/m",
            "upload_folder": None,
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
    return Hub(monkeypatch)


@pytest.mark.parametrize(
    ("repo_id", "full"), [(None, "ada/m-2of4"), ("mine", "ada/mine"), ("lab/mine", "lab/mine"), ("ada/x", "ada/x")]
)
def test_the_name_in_full(hub: Hub, repo_id: str | None, full: str) -> None:
    assert check_access(repo_id, "m-2of4", TOKEN) == full
    assert hub.calls["auth_check"]["args"] == (full,)
    assert hub.calls["auth_check"]["write"] is True
    assert hub.calls["whoami"]["token"] == TOKEN


def test_a_repository_that_does_not_exist_yet_is_fine(hub: Hub) -> None:
    hub.answers["auth_check"] = http_error(RepositoryNotFoundError, "404")
    assert check_access("new", "m") == "ada/new"


@pytest.mark.parametrize("name", ["m-2:4", "a/b/c", "-x", ""])
def test_a_name_that_the_hub_forbids(hub: Hub, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a Hub repository"):
        check_access(name, "m:4")
    assert hub.calls == {}


def test_a_token_that_may_only_read(hub: Hub) -> None:
    hub.answers["whoami"]["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(HubError, match="may only read"):
        check_access("m", "m")


def test_somebody_elses_namespace(hub: Hub) -> None:
    with pytest.raises(HubError, match="belongs to ada, who may write to ada, lab"):
        check_access("bob/m", "m")


def test_a_repository_that_may_not_be_written(hub: Hub) -> None:
    hub.answers["auth_check"] = http_error(HfHubHTTPError, "403 Forbidden")
    with pytest.raises(HubError, match="You cannot push to lab/m: 403 Forbidden"):
        check_access("lab/m", "m")


def test_a_push_replaces_older_weights_in_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    assert push(tmp_path, "ada/m", private=True, token=TOKEN) == "https://hub/ada/m"
    assert hub.calls["create_repo"]["private"] is True
    assert hub.calls["create_repo"]["exist_ok"] is True
    sent = hub.calls["upload_folder"]
    assert sent["folder_path"] == tmp_path
    assert {"*.safetensors", "*.bin", "*.safetensors.index.json"} <= set(sent["delete_patterns"])
    assert "*.tmp" in sent["ignore_patterns"]


ERRORS = {
    "http": http_error(HfHubHTTPError, f"403 Forbidden for {TOKEN}, not for {OTHER}"),
    "network": HTTP("connection refused"),
    "xet": ConnectionError("Network error: reset"),
    "lfs": RuntimeError("Error while uploading 'model.safetensors'"),
    "card": ValueError("Invalid metadata in README.md.\n- missing"),
    "disk": OSError(28, "No space left on device"),
}
ERRORS["lfs"].__cause__ = OSError("500 from the store")


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_every_failure_says_where_the_model_is_and_how_to_go_on(hub: Hub, tmp_path: Path, kind: str, step: str) -> None:
    hub.answers[step] = ERRORS[kind]
    with pytest.raises(HubError) as caught:
        push(tmp_path, "ada/m", private=False, token=TOKEN)
    text = str(caught.value)
    assert text.startswith("The push to ada/m failed: ")
    assert f"the model is safe in {tmp_path}; send it again with `hf upload ada/m {tmp_path} ." in text
    assert TOKEN not in text
    assert OTHER not in text
    assert "\n" not in text
    assert kind != "lfs" or "500 from the store" in text


def test_a_private_push_is_sent_again_as_a_private_one(hub: Hub, tmp_path: Path) -> None:
    hub.answers["create_repo"] = ERRORS["http"]
    with pytest.raises(HubError, match=r"hf upload ada/m \S+ \. --private --delete"):
        push(tmp_path, "ada/m", private=True)


def test_no_token(hub: Hub) -> None:
    hub.answers["whoami"] = LocalTokenNotFoundError("Token is required, and much more")
    with pytest.raises(HubError, match="there is none: run `hf auth login` or set HF_TOKEN") as caught:
        check_access(None, "m")
    assert "much more" not in str(caught.value)


def test_no_valid_token(hub: Hub) -> None:
    hub.answers["whoami"] = http_error(HfHubHTTPError, f"Invalid user token {TOKEN}.")
    with pytest.raises(HubError, match=r"Invalid user token \*\*\*; run `hf auth login`"):
        check_access(None, "m", TOKEN)
