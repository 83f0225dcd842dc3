"""Answers about accounts and repositories, and their files to read.

The client's side of each: `huggingface_hub.HfApi` (whoami, create_repo, auth_check, repo_info, list_repo_tree) and
`hf_hub_download`, which sends a HEAD to `resolve/` and expects the commit and the ETag in its headers.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from tests.loopback.store import Entry, Refused, git_oid
from tests.loopback.wire import BRANCH, FILE, REPO, Exchange, route

__all__ = ["ROUTES"]


def whoami(x: Exchange) -> None:
    """The token's owner, role and organisations."""
    user = x.known_user()
    orgs = [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "admin"} for org in user.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": user.role}}
    x.reply(
        200, {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth}
    )


def create(x: Exchange) -> None:
    """A new repository. One that exists is a 409 with its address, which the client takes for success if told so."""
    user, asked = x.known_user(), x.json()
    kind, namespace = asked.get("type", "model"), asked.get("organization") or user.name
    repo_id = f"{namespace}/{asked['name']}"
    if user.role != "write" or not user.owns(repo_id):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    url = f"{x.base}/{'' if kind == 'model' else 'datasets/'}{repo_id}"
    try:
        x.store.create(kind, repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    except Refused as refused:
        refused.body["url"] = url
        raise
    x.reply(200, {"url": url, "name": repo_id, "id": repo_id})


def auth_check(x: Exchange, kind: str, repo_id: str) -> None:
    """Whether the token may write to the repository."""
    x.repo(kind, repo_id, write=True)
    x.reply(200, {})


def info(x: Exchange, kind: str, repo_id: str, revision: str = "main") -> None:
    """The commit behind a branch, and the names of its files."""
    repo = x.repo(kind, repo_id)
    sha, tree = repo.at(revision)
    files = [{"rfilename": path} for path in sorted(tree)]
    x.reply(200, {"id": repo_id, "sha": sha, "private": repo.private, "gated": False, "tags": [], "siblings": files})


def tree(x: Exchange, kind: str, repo_id: str, revision: str, path: str = "") -> None:
    """Files and folders in a folder, and with `recursive` all that is in the folders below."""
    _, files = x.repo(kind, repo_id).at(revision)
    folder, deep = f"{path}/" if path else "", x.query("recursive")
    below = [name for name in sorted(files) if name.startswith(folder)]
    if path and not below:
        raise Refused(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
    folders = {str(parent) for name in below for parent in PurePosixPath(name[len(folder) :]).parents} - {"."}
    rows = [{"type": "directory", "path": folder + name, "oid": git_oid(name.encode()), "size": 0} for name in folders]
    rows += [_file_row(name, files[name]) for name in below]
    x.reply(200, [row for row in rows if deep or "/" not in row["path"][len(folder) :]])


def _file_row(path: str, entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.sha256:
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    if entry.xet:
        row["xetHash"] = entry.xet
    return row


def resolve(x: Exchange, repo_id: str, revision: str, path: str, kind: str = "model") -> None:
    """A file, or with HEAD only what it is. One stored by Xet is announced so, and fetched from there."""
    sha, files = x.repo(kind, repo_id).at(revision)
    if path not in files:
        raise Refused(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": sha})
    entry = files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{entry.etag}"'}
    if entry.sha256:
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
    if entry.xet:
        token = f"{x.base}/api/{kind}s/{repo_id}/xet-read-token/{sha}"
        headers |= {"X-Xet-Hash": entry.xet, "Link": f'<{token}>; rel="xet-auth"'}
    if x.command == "HEAD":
        x.reply(200, b"", {**headers, "Content-Length": str(entry.size)})
    elif "Range" in x.headers:
        start, last = x.span()
        piece = _content(x, entry)[start : last + 1]
        x.reply(206, piece, {**headers, "Content-Range": f"bytes {start}-{start + len(piece) - 1}/{entry.size}"})
    else:
        x.reply(200, _content(x, entry), headers)


def _content(x: Exchange, entry: Entry) -> bytes:
    if entry.content is not None:
        return entry.content
    if entry.xet is not None:
        return x.store.cas.content(entry.xet)
    assert entry.sha256 is not None
    return x.store.objects[entry.sha256]


ROUTES = [
    route("GET", r"/api/whoami-v2", whoami),
    route("POST", r"/api/repos/create", create),
    route("GET", REPO + r"/auth-check/write", auth_check),
    route("GET HEAD", REPO + r"/revision" + BRANCH, info),
    route("GET", REPO + r"/tree" + BRANCH + r"(?:/(?P<path>.*))?", tree),
    route("GET HEAD", REPO, info),
    route("GET HEAD", FILE + r"/resolve" + BRANCH + r"/(?P<path>.+)", resolve),
]
