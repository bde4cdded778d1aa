"""A stand-in for the hub: as much of its HTTP API as uploads, downloads and their refusals ask for, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens of the user: one that may write to what is hers, one that may only read."""

LARGE = (".safetensors",)
"""What goes the way of large files, whatever its size."""


@dataclass
class Repository:
    """A model repository: each commit's files, and where its branches are."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        content = repr(
            (len(self.commits), sorted((name, hashlib.sha1(body).hexdigest()) for name, body in files.items()))
        )
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Hub:
    """The hub's state, which a test looks at and changes.

    Attributes:
        blobs: large files by their sha256, committed or not.
        refuse: asked before each request, by method and path: a status to answer in its place, 0 to drop the line.
        cut: name of a file -> bytes of it after which the line breaks, once.
        ranges: what was asked for by `Range`, in its words.
        requests: method and path of all there were.
        user: who has the tokens.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    cut: dict[str, int] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    user: str = "alice"

    def count(self, method: str, part: str) -> int:
        return sum(one == method and part in path for one, path in self.requests)

    def create(self, name: str, **kind: Any) -> Repository:
        repository = self.repositories[name] = Repository(**kind)
        repository.commit({".gitattributes": b""})
        return repository


class Refusal(Exception):
    """Another answer than what was asked for; with a code that the library knows, or more to tell."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.hub.requests.append((self.command, path))
        status = self.hub.refuse(self.command, path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if status != 0 else b""
        try:
            if status == 0:
                self.close_connection = True
                self.connection.shutdown(2)
                return
            if status:
                raise Refusal(status, "the stand-in was told to")
            self.route(path)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.send(refusal.status, json.dumps({"error": refusal.message} | refusal.more).encode(), headers)

    def route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            self.send_json({"type": "user", "name": self.user(), "orgs": []})
        elif path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif path == "/api/validate-yaml":
            wrong = "license: nonsense" in json.loads(self.body)["content"]
            message = '"license" must be one of [apache-2.0, ...]'
            self.send(
                400 if wrong else 200, json.dumps({"errors": [{"message": message}] * wrong, "warnings": []}).encode()
            )
        elif path.startswith("/lfs/"):
            self.hub.blobs[path.removeprefix("/lfs/")] = self.body
            self.send(200, b"")
        elif path.startswith("/api/models/"):
            owner, name, *rest = [*path.removeprefix("/api/models/").split("/"), ""]
            self.model(f"{owner}/{name}", *rest)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(path.removeprefix("/").partition(".git/")[0])
        elif path.count("/") > 4 and path.split("/")[3] == "resolve":
            owner, name, _, revision, *rest = path.removeprefix("/").split("/")
            self.resolve(f"{owner}/{name}", revision, "/".join(rest))
        else:
            raise Refusal(404, f"no {path} here")

    def model(self, name: str, action: str = "", *rest: str) -> None:
        wanted = "/".join(rest).rstrip("/")
        if action in ("", "revision"):
            oid, files = self.readable(name, wanted or "main")
            siblings = [{"rfilename": file} for file in files]
            private = self.hub.repositories[name].private
            self.send_json({"id": name, "sha": oid, "siblings": siblings, "tags": [], "private": private})
        elif action == "tree":
            _, files = self.readable(name, rest[0])
            self.send_json([self.entry(file, body) for file, body in sorted(files.items())])
        elif action == "branch":
            repository = self.writable(name)
            if wanted in repository.branches:
                raise Refusal(409, "the branch is there")
            repository.branches[wanted] = repository.branches["main"]
            self.send_json({})
        elif action == "preupload":
            files = self.writable(name).files(wanted) or {}
            self.send_json({"files": [self.upload_mode(asked, files) for asked in json.loads(self.body)["files"]]})
        elif action == "commit":
            self.commit(name, wanted)
        else:
            raise Refusal(404, f"no {action} here")

    @staticmethod
    def entry(file: str, body: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        if file.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return entry

    @staticmethod
    def upload_mode(asked: dict[str, Any], there: dict[str, bytes]) -> dict[str, Any]:
        mode = "lfs" if asked["path"].endswith(LARGE) else "regular"
        answer = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
        if (body := there.get(asked["path"])) is not None:
            blob = b"blob %d\0" % len(body) + body
            answer["oid"] = hashlib.sha256(body).hexdigest() if mode == "lfs" else hashlib.sha1(blob).hexdigest()
        return answer

    def create(self, asked: dict[str, Any]) -> None:
        user = self.user(write=True)
        owner = asked["organization"] or user
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.endpoint}/{name}")
        self.hub.create(name, private=asked.get("visibility") == "private")
        self.send_json({"url": f"{self.hub.endpoint}/{name}"})

    def batch(self, name: str) -> None:
        self.writable(name)
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            | (
                {}
                if one["oid"] in self.hub.blobs
                else {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            )
            for one in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, branch: str) -> None:
        repository = self.writable(name)
        files, message = dict(repository.files(branch) or {}), ""
        for line in map(json.loads, self.body.splitlines()):
            what, value = line["key"], line["value"]
            if what == "header":
                message = value["summary"]
            elif what == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif what == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif what == "deletedFile":
                del files[value["path"]]
        asked = "create_pr" in self.query
        oid = repository.commit(files, "refs/pr/1" if asked else branch, message)
        pull_request = f"{self.hub.endpoint}/{name}/discussions/1" if asked else None
        self.send_json(
            {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pull_request}
        )

    def resolve(self, name: str, revision: str, file: str) -> None:
        oid, files = self.readable(name, revision)
        if file not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        body = files[file]
        digest = hashlib.sha256(body).hexdigest() if file.endswith(LARGE) else hashlib.sha1(body).hexdigest()
        headers = {"X-Repo-Commit": oid, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.send(206, body[start:], headers)
            return
        self.send(200, body, headers)

    def user(self, write: bool = False) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise Refusal(401, "Invalid username or password.")
        if write and token != WRITER:
            raise Refusal(403, "You must use a write token")
        return self.hub.user

    def readable(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.hub.repositories.get(name)
        if self.headers.get("Authorization"):
            self.user()
        known = self.headers.get("Authorization") is not None and name.startswith(f"{self.hub.user}/")
        if repository is None or (repository.private and not known):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if repository.gated and not known:
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        files = repository.files(revision)
        if files is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.branches.get(revision, revision), files

    def writable(self, name: str) -> Repository:
        user = self.user(write=True)
        if name not in self.hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if not name.startswith(f"{user}/") and "create_pr" not in self.query and "/info/lfs/" not in self.path:
            raise Refusal(403, "pass `create_pr=1` as a query parameter to create a Pull Request")
        return self.hub.repositories[name]

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            most = self.hub.cut.pop(self.path.rpartition("/")[2], None)
            self.wfile.write(body[:most])
            if most is not None:
                self.close_connection = True
                self.connection.shutdown(2)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub of no models, while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
