"""One sentence for every way in which the Hub's client fails.

The client has no exception of its own for a push that failed. What comes out is of seven families that share no base
(huggingface_hub 2.4, hf_xet 1.8):

    HfHubHTTPError           the Hub answered, and the answer is no: token, rights, quota, limits
    the HTTP library's error nobody answered: refused connection, line cut
    ConnectionError          Xet's storage: refused, failing, dropped; and offline mode
    RuntimeError             LFS' storage; the real error is its `__cause__`
    ValueError               the card's front matter is not what the Hub accepts
    OSError                  no token; a file that cannot be read, a full disk
    SafetensorsParsingError  what was read back is no shard
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)

from llmprune.errors import HubError, LlmpruneError

__all__ = ["NO_TOKEN", "translated"]

NO_TOKEN = "Pushing needs a Hub token that may write, and there is none: run `hf auth login` or set HF_TOKEN."

# Connection errors are not OSErrors; they share this base of the HTTP library, httpx or httpx2, that the client uses.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_FAMILIES = (_HTTP_ERROR, OSError, RuntimeError, ValueError, SafetensorsParsingError)

_MEANING = {
    401: "the token is not valid",
    402: "the account's plan does not allow it",
    403: "the Hub forbids it",
    409: "the repository was changed at the same time",
    412: "the repository was changed at the same time",
    413: "there is not enough space on the Hub",
    429: "the Hub wants fewer requests for now",
    507: "there is not enough space on the Hub",
}
"""What a status says, where the Hub's own words may not."""


@contextmanager
def translated(what: str, cure: str, token: str | None = None) -> Iterator[None]:
    """Turn whatever the client raises into a HubError, "`what`: the cause; `cure`.", without any token in it.

    `token` is the one in use, or None for the one that the client finds by itself.
    """
    try:
        yield
    except LlmpruneError:
        raise
    except LocalTokenNotFoundError:
        raise HubError(NO_TOKEN) from None
    except _FAMILIES as error:
        secrets = {secret for secret in (token, get_token()) if secret}
        told = HubError(f"{what}: {_redacted(_cause(error), secrets)}; {cure}.")
        whole = "".join(traceback.format_exception(error))
        # A traceback prints the client's message too.
        raise told from (error if _redacted(whole, secrets) == whole else None)


def _cause(error: BaseException) -> str:
    """The cause in one line."""
    root = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    said = _one_line(getattr(root, "server_message", None) or str(root)) or type(root).__name__
    if isinstance(root, OfflineModeIsEnabled):
        return "the Hub is switched off here (HF_HUB_OFFLINE)"
    if isinstance(root, RepositoryNotFoundError):
        return f"the repository does not exist, or the token may not see it ({said})"
    if (status := _status(root)) is not None:
        meaning = _MEANING.get(status) or ("the Hub itself failed" if status >= 500 else "the Hub refuses")
        return f"{meaning} ({said})"
    if isinstance(root, ConnectionError):
        return f"the Hub's storage does not answer ({said})"
    if isinstance(root, _HTTP_ERROR):
        return f"the Hub does not answer ({said})"
    return said


def _status(error: BaseException) -> int | None:
    """The status of the answer. Xet's errors have it in their text only."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    match = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(error))
    return int(match[1]) if match else None


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _redacted(text: str, secrets: set[str]) -> str:
    """`text` without tokens, and without what follows the ? of an address: a storage's signatures stand there."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1?***", text)
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)
