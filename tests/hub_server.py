"""The part of the Hub's HTTP interface that a snapshot download uses, served from directories on loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "a" * 40


class HubServer(http.server.ThreadingHTTPServer):
    """Serves `repositories` ("owner/name" -> directory) at `url`, and records the files that were fetched."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(body_wanted=False)

    def do_GET(self) -> None:
        self._answer(body_wanted=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body_wanted: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[-1], body_wanted)
        else:
            self._send(404, b"{}")

    def _describe(self, repository: str, rest: list[str]) -> None:
        directory = self.server.repositories.get(repository)
        if directory is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in directory.iterdir() if path.is_file())
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _hash(f.read_bytes())} for f in files
            ]
            self._send(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": f.name} for f in files]
            self._send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())

    def _file(self, repository: str, name: str, body_wanted: bool) -> None:
        path = self.server.repositories[repository] / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        if body_wanted:
            self.server.fetched.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_hash(content)}"'}
        self._send(200, content, headers, body_wanted)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(body)


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
