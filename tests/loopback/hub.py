"""A Hub on the loopback, for the real clients: `huggingface_hub`, `transformers`, `datasets`, hf_xet, in a subprocess.

    with hub(tmp_path) as h:
        h.add("openai-community/gpt2", {"config.json": …})
        subprocess.run([…], env=h.env)

It speaks the Hub's HTTP API, LFS and Xet, so that pulls and pushes take the paths that they take in production. The
clients read their settings when they are imported, which is why a test gives `env` to a process of its own. Errors
have the statuses, codes and texts of the Hub; its permissions are simplified to namespaces and read or write tokens.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.loopback import repos, uploads
from tests.loopback.store import Repo, Store, User
from tests.loopback.wire import Exchange, Fault, Hold, Request

__all__ = ["READ_TOKEN", "WRITE_TOKEN", "WRONG_TOKEN", "LoopbackHub", "hub"]

WRITE_TOKEN, READ_TOKEN, WRONG_TOKEN = "hf_AliceMayWrite", "hf_AliceMayRead", "hf_NobodyHasThis"
"""alice, who belongs to the organisation acme, with a token that may write and one that may only read."""

_TOKENS = {WRITE_TOKEN: User("alice", "write", ("acme",)), READ_TOKEN: User("alice", "read", ("acme",))}
_ALIASES = {"gpt2": "openai-community/gpt2"}


class LoopbackHub(ThreadingHTTPServer):
    """The server. Use it through `hub`, which starts and stops it."""

    daemon_threads = True

    def __init__(self, home: Path) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.store = Store(_TOKENS, _ALIASES)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.home = home

    @property
    def url(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process for which this is the Hub, with a cache of its own and the token that may write.

        Nothing of ours that names another Hub, a token or offline mode comes in. Xet's retries are cut short: by
        default it takes four minutes to give up.
        """
        ours = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {
            **ours,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def add(self, repo_id: str, files: Mapping[str, bytes] | Path, *, kind: str = "model", branch: str = "main") -> str:
        """Put files into a repository, made if there is none, as one commit, and return the commit's id.

        `files` is path → content, or a folder. A branch that is new begins empty.
        """
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repo = self.store.repos.get((kind, repo_id)) or self.store.create(kind, repo_id)
        entries = {path: self.store.add(path, content) for path, content in files.items()}
        return repo.commit(entries, "added by a test", branch=branch)

    def repo(self, repo_id: str) -> Repo:
        """A model repository, to look into."""
        return self.store.repos["model", repo_id]

    def files(self, repo_id: str) -> set[str]:
        """The paths on a model repository's main branch."""
        return set(self.repo(repo_id).at("main")[1])

    def forget(self, directory: Path) -> None:
        """As if the weights in this folder, which other tests may have sent, had never come."""
        for path in directory.glob("*.safetensors"):
            for known in (self.store.objects, self.store.cas.by_sha256):
                known.pop(hashlib.sha256(path.read_bytes()).hexdigest(), None)

    def fault(
        self,
        path: str,
        *,
        status: int | None = None,
        message: str = "ordered by a test",
        after: int = 0,
        times: int = 1,
    ) -> None:
        """Let the next requests whose path matches the regular expression go wrong.

        They are answered with `status` and `message`; without a status the line is cut after so many bytes of the body.
        """
        self.faults.append(Fault(path, status, message, after, times))

    def hold(self, path: str) -> Hold:
        """Let the next request whose path matches wait until the returned hold is released."""
        hold = Hold()
        self.faults.append(Fault(path, None, "", 0, 1, hold))
        return hold


@contextmanager
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running Hub, empty, with a fresh HF_HOME below `tmp_path`: Xet's cache remembers what its Hub already has."""
    server = LoopbackHub(tmp_path / "hf-home")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Exchange.routes.extend([*repos.ROUTES, *uploads.ROUTES])
