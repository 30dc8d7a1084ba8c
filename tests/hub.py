"""A stand-in for the Hugging Face hub on this machine: the requests that creating a repository, uploading a folder and
downloading its files make."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Repositories in memory, {name: {path: content}}. Requests without `token`, and those whose path contains `refused`,
    are refused."""

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), _Requests)
        self.token, self.repositories, self.private, self.blobs, self.refused = token, {}, {}, {}, None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(token: str) -> Iterator[Hub]:
    hub = Hub(token)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api" and not self._is_known():
            hidden = {} if parts[1] == "whoami-v2" else {"X-Error-Code": "RepoNotFound"}
            return self._answer({"error": "Invalid username or password."}, 401, hidden)
        if parts == ["api", "whoami-v2"]:
            return self._answer({"type": "user", "name": "me", "auth": {"type": "access_token"}})
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api":
            return self._answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(content, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if not self._is_known():
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.server.refused and self.server.refused in path:
            return self._answer({"error": "You have exceeded your quota"}, 403)
        if path == "/api/repos/create":
            stated = json.loads(body)
            name = f"{stated.get('organization') or 'me'}/{stated['name']}"
            is_new = name not in self.server.repositories
            self.server.repositories.setdefault(name, {})
            is_private = (
                stated.get("private") or stated.get("visibility") == "private"
            )  # depends on the version of huggingface_hub
            self.server.private.setdefault(name, is_private)
            return self._answer({"url": f"{self.server.address}/{name}"}, 200 if is_new else 409)
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.server.address}/blobs/{one['oid']}"}}
            return self._answer({"transfer": "basic", "objects": objects})
        if path == "/api/validate-yaml":  # the request before README.md is uploaded
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        name = "/".join(path.split("/")[3:5])  # the request is a commit
        files = self.server.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.blobs[entry["value"]["oid"]]
        return self._answer({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _is_known(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.server.token}"

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: object, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
