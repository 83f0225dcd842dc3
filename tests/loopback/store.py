"""What the loopback Hub keeps, in memory: repositories with their commits, large files by sha256, and who may do what.

A repository is a line of commits per branch; a commit is a tree, which names each path's entry. A small file's bytes
stand in its entry, a large one's (LFS) are found by their sha256, in `Store.objects` or, sent by Xet, in `Store.cas`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tests.loopback.cas import Cas

__all__ = ["Commit", "Entry", "Refused", "Repo", "Store", "User", "git_oid", "is_large", "small"]

LFS_SUFFIXES = {".safetensors", ".bin", ".gguf", ".parquet", ".gz", ".model"}
LFS_LIMIT = 10 * 1024 * 1024  # bytes; everything larger goes as LFS, whatever its name


class Refused(Exception):
    """An answer that is no success: status, what the client is told, and the code by which it chooses its exception."""

    def __init__(
        self, status: int, message: str, code: str | None = None, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})
        self.body: dict[str, object] = {"error": message}


@dataclass(frozen=True)
class User:
    """Whom a token stands for: role is "read" or "write", orgs are the other namespaces that are theirs."""

    name: str
    role: str
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        """Whether the repository lies in a namespace of this user."""
        return repo_id.split("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class Entry:
    """A file in a tree. `oid` is git's name for it (for a large file, of its LFS pointer); size in bytes."""

    oid: str
    size: int
    content: bytes | None = None
    sha256: str | None = None
    pointer_size: int = 0
    xet: str | None = None

    @property
    def etag(self) -> str:
        """The name by which the client's cache knows the content."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository: path → entry."""

    tree: Mapping[str, Entry]
    title: str


@dataclass
class Repo:
    """One repository. `lock` is held from reading a branch's head to writing the next one: requests run in threads."""

    kind: str
    id: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def at(self, revision: str) -> tuple[str, Mapping[str, Entry]]:
        """(commit id, tree) of a branch or commit."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha].tree

    def branch(self, name: str) -> None:
        """A new branch at the head of main."""
        with self.lock:
            if name in self.refs:
                raise Refused(409, f"Reference {name} already exists")
            self.refs[name] = self.refs["main"]

    def commit(
        self, changes: Mapping[str, Entry], title: str, *, branch: str = "main", deleted: Sequence[str] = ()
    ) -> str:
        """Put a commit on top of a branch, begun from nothing if it is new, and return its id."""
        with self.lock:
            tree = dict(self.commits[self.refs[branch]].tree) if branch in self.refs else {}
            for path in deleted:
                if tree.pop(path, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            sha = os.urandom(20).hex()
            self.commits[sha] = Commit({**tree, **changes}, title)
            self.refs[branch] = sha
            return sha


class Store:
    """All repositories, large files, tokens, and the old short names that lead to a full one."""

    def __init__(self, tokens: Mapping[str, User], aliases: Mapping[str, str]) -> None:
        self.tokens, self.aliases = dict(tokens), dict(aliases)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.cas = Cas()
        self.lock = threading.Lock()

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> Repo:
        """A repository with its first commit. One that exists is refused."""
        with self.lock:
            if (kind, repo_id) in self.repos:
                raise Refused(409, f"You already created this {kind} repo: {repo_id}")
            repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        repo.commit({".gitattributes": small(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit")
        return repo

    def visible(self, kind: str, repo_id: str, user: User | None, *, write: bool = False) -> Repo:
        """The repository, if this user may read it, or write to it."""
        repo = self.repos.get((kind, repo_id))
        own = user is not None and user.owns(repo_id)
        if repo is None or (repo.private and not own):
            # The Hub does not tell a missing repository from one that you may not see.
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and not own:
            raise Refused(403, "You don't have write access to this repository")
        if write and user is not None and user.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def add(self, path: str, content: bytes) -> Entry:
        """The entry of a file that the Hub has from before, its content kept."""
        if not is_large(path, len(content), content[:512]):
            return small(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return self.large(sha256, len(content))

    def large(self, sha256: str, size: int) -> Entry:
        """The entry of a large file whose content was uploaded."""
        xet = self.cas.by_sha256.get(sha256)
        if xet is None and len(self.objects.get(sha256, b"")) != size:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(git_oid(pointer), size, sha256=sha256, pointer_size=len(pointer), xet=xet)


def small(content: bytes) -> Entry:
    """The entry of a file that git keeps itself."""
    return Entry(git_oid(content), len(content), content)


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub wants a file as LFS: by name, by size, or because it is no text."""
    return PurePosixPath(path).suffix in LFS_SUFFIXES or size > LFS_LIMIT or b"\0" in sample


def git_oid(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
