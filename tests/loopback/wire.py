"""HTTP of the loopback Hub: one request at a time from its line to its answer, and the faults that a test ordered.

What the addresses mean stands in repos.py, uploads.py and xet.py, as tables of routes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from tests.loopback.store import Refused, Repo, Store, User

if TYPE_CHECKING:
    from tests.loopback.hub import LoopbackHub

__all__ = ["BRANCH", "FILE", "REPO", "Exchange", "Fault", "Hold", "Request", "Route", "route"]

_ID = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
REPO = rf"/api/(?P<kind>model|dataset)s/{_ID}"
FILE = rf"/(?:(?P<kind>dataset)s/)?{_ID}"
BRANCH = r"/(?P<revision>[^/]+)"


@dataclass(frozen=True)
class Route:
    """Which requests an answering function is for. Named groups of the pattern become its keyword arguments."""

    methods: str
    pattern: re.Pattern[str]
    answer: Callable[..., None]


def route(methods: str, pattern: str, answer: Callable[..., None]) -> Route:
    """A row of a table of routes."""
    return Route(methods, re.compile(pattern), answer)


@dataclass(frozen=True)
class Request:
    """What was asked and answered; status None: the line was cut."""

    method: str
    path: str
    status: int | None


@dataclass(frozen=True)
class Hold:
    """A request that waits: `reached` is set when it has come, and it goes on when `released` is set."""

    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Fault:
    """The next `times` requests whose path matches wait (`hold`), or go wrong: with `status`, or cut after so many
    bytes of the body."""

    path: str
    status: int | None
    message: str
    after: int
    times: int
    hold: Hold | None = None


class _Cut(Exception):
    """The line is cut: no answer."""


class Exchange(BaseHTTPRequestHandler):
    """One connection. The answering functions take it as their first argument."""

    protocol_version = "HTTP/1.1"
    server: LoopbackHub
    routes: ClassVar[list[Route]] = []

    url: SplitResult
    sent: int | None
    _body: bytes | None

    def log_message(self, *args: Any) -> None:
        """Nothing on the screen: requests are kept in `server.requests`."""

    def dispatch(self) -> None:
        """Answer one request, whatever happens."""
        self.url, self.sent, self._body = urlsplit(self.path), None, None
        try:
            self._meet_faults()
            self._answer()
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            said = {"X-Error-Message": refused.message, **code}
            self.reply(refused.status, refused.body, {**said, **refused.headers})
        except (_Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            # With data unread, closing sends a reset: the client sees a dropped line, as from a router that died.
            with suppress(OSError):  # it may be gone already
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            self.server.requests.append(Request(self.command, self.path, self.sent))

    do_GET = do_HEAD = do_POST = do_PUT = dispatch  # noqa: N815 - the names that http.server calls

    def _answer(self) -> None:
        for row in self.routes:
            match = row.pattern.fullmatch(self.url.path)
            if match and self.command in row.methods.split():
                # Ids and revisions come percent-encoded ("refs%2Fpr%2F1").
                row.answer(self, **{name: unquote(text) for name, text in match.groupdict().items() if text})
                return
        raise Refused(404, f"no such endpoint: {self.command} {self.url.path}")

    def _meet_faults(self) -> None:
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.path, self.path):
                fault.times -= 1
                if fault.hold is not None:
                    fault.hold.reached.set()
                    fault.hold.released.wait(timeout=60)
                    continue
                if fault.status is not None:
                    raise Refused(fault.status, fault.message)
                self.rfile.read(min(fault.after, self._length))
                raise _Cut

    @property
    def _length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def body(self) -> bytes:
        """The request's body, read once."""
        if self._body is None:
            self._body = self.rfile.read(self._length)
            if len(self._body) < self._length:
                raise ConnectionResetError("the client is gone")
        return self._body

    def json(self) -> Any:
        """The request's body as JSON."""
        return json.loads(self.body() or b"{}")

    def query(self, name: str) -> bool:
        """Whether the address says name=true."""
        return parse_qs(self.url.query).get(name, [""])[0].lower() in ("true", "1")

    def span(self) -> tuple[int, int]:
        """First and last byte that the `Range` header asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            raise Refused(400, "this Hub gives closed ranges only")
        return int(match[1]), int(match[2])

    def reply(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send an answer: bytes as they are, all else as JSON."""
        if self._body is None and self._length:
            self.close_connection = True  # an unread body would be taken for the connection's next request
        plain = isinstance(content, bytes)
        data = content if plain else json.dumps(content).encode()
        sent = {"Content-Length": str(len(data)), "X-Request-Id": os.urandom(6).hex()}
        sent |= {} if plain else {"Content-Type": "application/json"}
        sent |= {"Connection": "close"} if self.close_connection else {}
        self.sent = status
        self.send_response(status)
        for name, value in {**sent, **(headers or {})}.items():
            self.send_header(name, value.replace("\n", " "))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what -------------------------------------------------------------------------------------------

    @property
    def base(self) -> str:
        """This Hub's address, as the client knows it."""
        return f"http://{self.headers['Host']}"

    @property
    def store(self) -> Store:
        """What the Hub keeps."""
        return self.server.store

    def user(self) -> User | None:
        """Whom the token stands for; None where there is none."""
        token = str(self.headers.get("Authorization", "")).removeprefix("Bearer ").strip()
        if token and token not in self.store.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.store.tokens.get(token)

    def known_user(self) -> User:
        """The user, who must be logged in."""
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return user

    def repo(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        """The repository that is asked for. An old short name is redirected to the full one, as the Hub does."""
        full = self.store.aliases.get(repo_id) if kind == "model" else None
        if full is not None:
            raise Refused(307, "moved", headers={"Location": self.path.replace(repo_id, full, 1)})
        return self.store.visible(kind, repo_id, self.user(), write=write)
