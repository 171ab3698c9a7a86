"""The part of the Hugging Face hub's API that uploads and downloads of a small model use, as a local HTTP server."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_test"


class HubServer(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: the content of each file, by repository, branch and path.
        private: whether each repository was created as a private one.
        messages: of the commits.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a hub within the context."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        repository, action, revision = "/".join(parts[2:4]), parts[4], unquote(parts[5])
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if action == "branch":
            self.server.files.setdefault((repository, revision), {})
            return self._answer(200, {})
        return self._commit(repository, revision, body)

    def _create(self, request: dict) -> None:
        owner = request.get("organization") or "me"
        name = f"{owner}/{request['name']}"
        exists = name in self.server.private
        if not exists:
            self.server.private[name] = request.get("visibility") == "private" or request.get("private") is True
            self.server.files[name, "main"] = {}
        self._answer(409 if exists else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def _commit(self, repository: str, revision: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.server.messages.append(entry["value"]["summary"])
            else:
                content = base64.b64decode(entry["value"]["content"])
                self.server.files[repository, revision][entry["value"]["path"]] = content
        address = f"{self.server.url}/{repository}/commit/{'0' * 40}"
        self._answer(200, {"success": True, "commitUrl": address, "commitOid": "0" * 40})

    def do_HEAD(self) -> None:
        self._send_file(with_body=False)

    def do_GET(self) -> None:
        self._send_file(with_body=True)

    def _send_file(self, with_body: bool) -> None:
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.server.files.get(("/".join(parts[2:4]), "main"))
            if files is None or len(parts) > 4:  # A folder of chat templates, for example.
                return self._missing("RepoNotFound" if files is None else "EntryNotFound")
            siblings = [{"rfilename": path} for path in files]
            return self._answer(200, {"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": siblings})
        repository, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        revision = "main" if revision == "0" * 40 else revision
        content = self.server.files.get((repository, revision), {}).get(path)
        if content is None:
            return self._missing("EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)
        return None

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
