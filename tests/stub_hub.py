"""A Hub on the loopback address: as much of its API as an upload asks for, with failures on demand. It keeps what it is sent."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "NeverToBeShownAnywhere0123456789"  # made up


@dataclass
class Hub:
    """What the stub holds, and what it was asked."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # id -> branch -> path -> content
    private: dict[str, Any] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)  # LFS, by SHA-256
    commits: list[dict[str, Any]] = field(default_factory=list)
    collections: dict[str, list[str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)  # SHA-256 of each object that was put, in order
    break_on: int = -1  # the connection breaks at this put (counted from 0), and at every later one, until it is mended
    refuse: int = 0  # the status of every answer
    halfway: Callable[[str], None] = lambda path: None  # called when half of an answer is sent
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, value: Any = None, status: int = 200, headers: dict[str, str] | None = None, content: bytes | None = None) -> None:
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            half = len(content) // 2
            self.wfile.write(content[:half])
            self.hub.halfway(self.path)
            self.wfile.write(content[half:])

    def _handle(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append((self.command, path))
        if self.headers.get("Authorization"):
            hub.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.refuse:
            return self._answer({"error": f"no, said to {self.headers.get('Authorization')}"}, hub.refuse)
        if match := re.fullmatch(r"/upload/(\w+)", path):
            if 0 <= hub.break_on <= len(hub.sent):
                self.close_connection = True
                return self.connection.close()
            assert hashlib.sha256(body).hexdigest() == match[1]
            hub.storage[match[1]] = body
            hub.sent.append(match[1])
            return self._answer({})
        return self._api(path, json.loads(body) if body and "ndjson" not in self.headers.get("Content-Type", "") else body)

    def _api(self, path: str, body: Any) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            repo = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
            if repo in hub.repos:
                return self._answer({"error": "it exists", "url": f"{hub.url}/{repo}"}, 409)
            hub.repos[repo], hub.private[repo] = {"main": {}}, body.get("private", body.get("visibility"))
            return self._answer({"url": f"{hub.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/verify":
            return self._answer({})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(branch|preupload|commit|revision|tree)/([\w.-]+)/?", path):
            repo, verb, revision = match.groups()
            if verb == "branch":
                if revision in hub.repos[repo]:
                    return self._answer({"error": "it exists"}, 409)
                hub.repos[repo][revision] = {}
                return self._answer({}, 201)
            files = hub.repos[repo][revision]
            if verb == "preupload":
                large = lambda name: name.endswith((".safetensors", ".gguf"))  # noqa: E731
                told = [
                    {"path": f["path"], "uploadMode": "lfs" if large(f["path"]) else "regular", "shouldIgnore": False}
                    for f in body["files"]
                ]
                return self._answer({"files": told})
            if verb == "commit":
                return self._commit(repo, revision, [json.loads(line) for line in body.splitlines()])
            if verb == "tree":
                return self._answer(
                    [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in files.items()]
                )
            return self._answer({"id": repo, "sha": "0" * 40, "siblings": [{"rfilename": name} for name in files]})
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for one in body["objects"]:
                told = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in hub.storage:
                    told["actions"] = {"upload": {"href": f"{hub.url}/upload/{one['oid']}"}, "verify": {"href": f"{hub.url}/verify"}}
                objects.append(told)
            return self._answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            content = hub.repos.get(match[1], {}).get(match[2], {}).get(match[3])
            if content is None:
                return self._answer({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
            tag = hashlib.sha256(content).hexdigest()
            return self._answer(content=content, headers={"ETag": f'"{tag}"', "X-Repo-Commit": "0" * 40})
        if path == "/api/collections":
            slug = f"{body['namespace']}/{body['title'].lower().replace(' ', '-')}-0123456789abcdef"
            hub.collections.setdefault(slug, [])
            return self._answer({"slug": slug, "title": body["title"], "owner": {}, "items": [], "lastUpdated": "2026-01-01T00:00:00Z",
                                 "position": 0, "private": False, "theme": "blue", "upvotes": 0, "isUpvotedByUser": False})  # fmt: skip
        if match := re.fullmatch(r"/api/collections/([\w.-]+/[\w.-]+)/items?", path):
            hub.collections.setdefault(match[1], []).append(body["item"]["id"])
            return self._answer({"slug": match[1], "title": "x", "owner": {}, "items": [], "lastUpdated": "2026-01-01T00:00:00Z",
                                 "position": 0, "private": False, "theme": "blue", "upvotes": 0, "isUpvotedByUser": False})  # fmt: skip
        return self._answer({"error": f"the stub knows no {self.command} {path}"}, 404)

    def _commit(self, repo: str, revision: str, lines: list[dict[str, Any]]) -> None:
        files, added, removed = self.hub.repos[repo][revision], [], []
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]  # only what was put can be named
            elif key == "deletedFile":
                del files[value["path"]]
                removed.append(value["path"])
            added += [value["path"]] if key in ("file", "lfsFile") else []
        head = next(line["value"] for line in lines if line["key"] == "header")
        self.hub.commits.append({"repo": repo, "revision": revision, "added": added, "removed": removed, **head})
        oid = f"{len(self.hub.commits):040x}"
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    do_GET = do_HEAD = do_POST = do_PUT = _handle


class _Listening(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class Server:
    """with Server() as hub: hub.url is where it listens."""

    def __enter__(self) -> Hub:
        self.hub = Hub()
        handler = type("Handler", (_Handler,), {"hub": self.hub})
        self._server = _Listening(("127.0.0.1", 0), handler)
        self.hub.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self.hub

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
