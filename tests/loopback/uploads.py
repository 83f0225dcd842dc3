"""Answers to a push: what goes how, large files by LFS or by Xet, and the commit that brings all of it at once.

The client asks `preupload` for each file's way, sends the large ones, and posts one commit of lines of JSON. Large
files go by Xet; by LFS where HF_HUB_DISABLE_XET is set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from typing import Any

import yaml

from tests.loopback.cas import UnknownXorb
from tests.loopback.store import Entry, Refused, is_large, small
from tests.loopback.wire import BRANCH, FILE, REPO, Exchange, route

__all__ = ["ROUTES"]


def validate_yaml(x: Exchange) -> None:
    """The front matter of a model card, which must be a YAML mapping."""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---", x.json()["content"], re.DOTALL)
    try:
        sound = front is None or isinstance(yaml.safe_load(front[1]), dict)
    except yaml.YAMLError:
        sound = False
    if not sound:
        refused = Refused(400, "bad yaml")
        refused.body |= {"errors": [{"message": "metadata is not a mapping"}], "warnings": []}
        raise refused
    x.reply(200, {"errors": [], "warnings": []})


def preupload(x: Exchange, kind: str, repo_id: str, revision: str) -> None:
    """How each file is to be sent, and what stands in its place: the client skips a file that is there already."""
    _, tree = x.repo(kind, repo_id, write=not revision.startswith("refs/pr/")).at(revision)
    files = []
    for file in x.json()["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        there = tree[file["path"]].etag if file["path"] in tree else None
        mode = "lfs" if large else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there})
    x.reply(200, {"files": files})


def commit(x: Exchange, kind: str, repo_id: str, revision: str) -> None:
    """Files come and go in one step; readers see all of it or nothing."""
    lines = [json.loads(line) for line in x.body().splitlines() if line.strip()]
    repo = x.repo(kind, repo_id, write=not revision.startswith("refs/pr/"))
    repo.at(revision)
    title = ""
    changes: dict[str, Entry] = {}
    deleted: list[str] = []
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            title = value["summary"]
        elif line["key"] == "file":
            changes[value["path"]] = small(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            changes[value["path"]] = x.store.large(value["oid"], value["size"])
        elif line["key"] == "deletedFile":
            deleted.append(value["path"])
        else:
            raise Refused(400, f"this Hub does not know the line {line['key']!r} of a commit")
    sha = repo.commit(changes, title, branch=revision, deleted=deleted)
    x.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{x.base}/{repo_id}/commit/{sha}", "hookOutput": ""})


def branch(x: Exchange, kind: str, repo_id: str, revision: str) -> None:
    """A new branch, which begins where main is. One that exists is a 409, which the client forgives if told so."""
    x.json()
    if revision.startswith("refs/"):
        raise Refused(400, f"Invalid reference for a branch: {revision}")
    x.repo(kind, repo_id, write=True).branch(revision)
    x.reply(200, {})


def open_pull_request(x: Exchange, kind: str, repo_id: str) -> None:
    """A pull request, for which reading the repository is enough, and its branch."""
    if x.known_user().role != "write":
        raise Refused(403, "Forbidden: you must use a write token to open a pull request.")
    repo, title = x.repo(kind, repo_id), x.json()["title"]
    repo.pull_requests.append(title)
    repo.branch(f"refs/pr/{len(repo.pull_requests)}")
    x.reply(200, {"num": len(repo.pull_requests)})


def pull_request(x: Exchange, kind: str, repo_id: str, number: str) -> None:
    """What the client asks about a pull request that it has opened."""
    title = x.repo(kind, repo_id).pull_requests[int(number) - 1]
    about = {"title": title, "num": int(number), "status": "draft", "createdAt": "2026-01-01T00:00:00.000Z"}
    changes = {"base": "refs/heads/main"}
    repo = {"name": repo_id, "type": kind}
    x.reply(
        200, {**about, "repo": repo, "isPullRequest": True, "changes": changes, "filesWithConflicts": [], "events": []}
    )


# LFS ------------------------------------------------------------------------------------------------------------------


def lfs_batch(x: Exchange, repo_id: str, kind: str = "model") -> None:
    """Where to put each large file; nowhere if it is here."""
    x.repo(kind, repo_id, write=True)
    objects: list[dict[str, Any]] = []
    for wanted in x.json()["objects"]:
        row = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in x.store.objects:
            verify = {"href": f"{x.base}/_lfs-verify/{wanted['oid']}"}
            row["actions"] = {"upload": {"href": f"{x.base}/_lfs/{wanted['oid']}"}, "verify": verify}
        objects.append(row)
    x.reply(200, {"transfer": "basic", "objects": objects})


def lfs_put(x: Exchange, oid: str) -> None:
    """A large file's bytes, which must be what their name says."""
    data = x.body()
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(400, "sha256 of the body is not the oid")
    x.store.objects[oid] = data
    x.reply(200)


def lfs_verify(x: Exchange, oid: str) -> None:
    """Whether it came in full."""
    x.store.large(oid, x.json()["size"])
    x.reply(200, {})


# Xet ------------------------------------------------------------------------------------------------------------------


def xet_token(x: Exchange, kind: str, repo_id: str, access: str, revision: str) -> None:
    """The address of the content store and a token for it that lives an hour."""
    x.repo(kind, repo_id, write=access == "write" and not revision.startswith("refs/pr/")).at(revision)
    expires = int(time.time()) + 3600
    token, url = f"xet-{access}", f"{x.base}/_cas"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    x.reply(200, {"accessToken": token, "exp": expires, "casUrl": url}, headers)


def _need(x: Exchange, access: str) -> None:
    allowed = ("xet-write",) if access == "write" else ("xet-read", "xet-write")
    if x.headers.get("Authorization", "").removeprefix("Bearer ") not in allowed:
        raise Refused(401, f"a Xet token to {access} is needed")


def put_xorb(x: Exchange, xorb: str) -> None:
    """Packed chunks."""
    _need(x, "write")
    fresh = xorb not in x.store.cas.xorbs
    x.store.cas.xorbs[xorb] = x.body()
    x.reply(200, {"was_inserted": fresh})


def put_shard(x: Exchange) -> None:
    """The files that are made of those chunks."""
    _need(x, "write")
    try:
        x.store.cas.add_shard(x.body())
    except UnknownXorb as error:
        raise Refused(400, f"xorb {error} was not uploaded") from error
    x.reply(200, b'{"type":"result","result":1}\n', {"Content-Type": "application/x-ndjson"})


def reconstruction(x: Exchange, file: str) -> None:
    """Which chunks make up a range of a file's bytes."""
    _need(x, "read")
    try:
        answer = x.store.cas.reconstruction(file, x.span(), f"{x.base}/_cas/data")
    except KeyError as error:
        raise Refused(404, "no such file") from error
    if answer is None:
        raise Refused(416, "range")
    x.reply(200, answer)


def xorb_data(x: Exchange, xorb: str) -> None:
    """A range of a xorb's bytes. No token: the address was given to one who had one."""
    data, (start, last) = x.store.cas.xorbs[xorb], x.span()
    piece = data[start : last + 1]
    x.reply(206, piece, {"Content-Range": f"bytes {start}-{start + len(piece) - 1}/{len(data)}"})


_OID, _XORB, _FILE = (rf"/(?P<{name}>[0-9a-f]{{64}})" for name in ("oid", "xorb", "file"))

ROUTES = [
    route("POST", r"/api/validate-yaml", validate_yaml),
    route("POST", REPO + r"/preupload" + BRANCH, preupload),
    route("POST", REPO + r"/commit" + BRANCH, commit),
    route("POST", REPO + r"/branch" + BRANCH, branch),
    route("POST", REPO + r"/discussions", open_pull_request),
    route("GET", REPO + r"/discussions/(?P<number>\d+)", pull_request),
    route("POST", FILE + r"\.git/info/lfs/objects/batch", lfs_batch),
    route("PUT", r"/_lfs" + _OID, lfs_put),
    route("POST", r"/_lfs-verify" + _OID, lfs_verify),
    route("GET", REPO + r"/xet-(?P<access>read|write)-token" + BRANCH, xet_token),
    route("POST", r"/_cas/v1/xorbs/default" + _XORB, put_xorb),
    route("POST", r"/_cas/v2/shards", put_shard),
    route("GET", r"/_cas/v1/reconstructions" + _FILE, reconstruction),
    route("GET", r"/_cas/data" + _XORB, xorb_data),
]
