"""Every way in which the Hub's client fails becomes one sentence with the cause and the cure, and without a token."""

from __future__ import annotations

import traceback
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)

from llmprune.checkpoint.refusal import translated
from llmprune.errors import HubError, UserError

HTTP = HfHubHTTPError.__bases__[0]  # httpx or httpx2, whichever the client uses
TOKEN = "s3cret-of-an-own-hub"
OTHER = "hf_" + "Secret12" * 4  # stands in the client's message, wherever it came from


def http_error(kind: type[HfHubHTTPError], message: str, *, status: int | None = None) -> HfHubHTTPError:
    """One as the client raises it; made without a request."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.server_message = None
    error.response = None if status is None else SimpleNamespace(status_code=status)
    return error


def sentence(error: Exception, token: str | None = None) -> HubError:
    with pytest.raises(HubError) as caught, translated("It failed", "try again", token):
        raise error
    return caught.value


LFS = RuntimeError("Error while uploading 'model.safetensors'")
LFS.__cause__ = http_error(HfHubHTTPError, "the store is full", status=507)
XET = "Server error: Request error: HTTP status client error (413 Payload Too Large), domain: https://cas"

FAMILIES = {
    "the Hub": (http_error(HfHubHTTPError, "Forbidden:\n no rights.", status=403), "the Hub forbids it (Forbidden: no"),
    "the Hub, token": (http_error(HfHubHTTPError, "bad", status=401), "the token is not valid (bad)"),
    "the Hub, down": (http_error(HfHubHTTPError, "oh", status=503), "the Hub itself failed (oh)"),
    "the Hub, other": (http_error(HfHubHTTPError, "no", status=422), "the Hub refuses (no)"),
    "repository": (http_error(RepositoryNotFoundError, "404"), "does not exist, or the token may not see it (404)"),
    "nobody": (HTTP("connection refused"), "the Hub does not answer (connection refused)"),
    "xet": (ConnectionError("Network error: reset"), "the Hub's storage does not answer (Network error: reset)"),
    "xet, status": (ConnectionError(XET), "there is not enough space on the Hub (Server error"),
    "offline": (OfflineModeIsEnabled("Cannot reach"), "the Hub is switched off here (HF_HUB_OFFLINE)"),
    "lfs": (LFS, "there is not enough space on the Hub (the store is full)"),
    "card": (ValueError("Invalid metadata in README.md.\n- missing"), "Invalid metadata in README.md. - missing"),
    "disk": (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    "read back": (SafetensorsParsingError("not a safetensors file."), "not a safetensors file"),
    "no words": (ValueError(), "ValueError"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentence(family: str) -> None:
    error, expected = FAMILIES[family]
    told = sentence(error)
    assert str(told).startswith("It failed: ")
    assert expected in str(told)
    assert str(told).endswith("; try again.")
    assert "\n" not in str(told)
    assert told.__cause__ is error  # for who looks into it


def test_no_token_at_all() -> None:
    told = sentence(LocalTokenNotFoundError("Token is required, and much more"))
    assert "there is none: run `hf auth login` or set HF_TOKEN" in str(told)
    assert "much more" not in str(told)


@pytest.mark.parametrize("secret", [TOKEN, OTHER])
def test_a_token_stands_neither_in_the_sentence_nor_in_the_traceback(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    told = sentence(http_error(HfHubHTTPError, f"403 for {secret}", status=403))
    assert "the Hub forbids it (403 for ***)" in str(told)
    assert secret not in "".join(traceback.format_exception(told))


def test_a_signed_address_loses_its_signature() -> None:
    told = sentence(OSError("403 for url (https://store/a/b?X-Amz-Signature=5ecret&x=1), again"))
    assert "(https://store/a/b?***), again" in str(told)
    assert "5ecret" not in "".join(traceback.format_exception(told))


def test_the_token_that_was_given_is_hidden_too() -> None:
    assert TOKEN not in str(sentence(ValueError(f"what is {TOKEN}?"), TOKEN))


@pytest.mark.parametrize("error", [UserError("ours"), KeyError("a bug")])
def test_what_is_not_the_clients_passes(error: Exception) -> None:
    with pytest.raises(type(error)), translated("It failed", "try again"):
        raise error
