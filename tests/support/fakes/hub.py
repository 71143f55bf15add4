"""A Hugging Face hub on loopback: one repository, served from a folder as the real one serves it, as far as
`snapshot_download` asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(
    files: Path, repository: str, monkeypatch: pytest.MonkeyPatch, cache: Path, *, gated: bool = False
) -> Iterator[list[str]]:
    """Let huggingface_hub see only this hub, and keep its cache at `cache`; yields the names of the files asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:  # the base class's name
            pass

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            headers = {"X-Repo-Commit": COMMIT}
            if not path.startswith((f"/api/models/{repository}", f"/{repository}/")):
                self.refuse(404, "RepoNotFound")
            elif f"/{'revision' if path.startswith('/api') else 'resolve'}/" in path and not any(
                f"/{known}" in path for known in ("main", "v1", COMMIT)
            ):
                self.refuse(404, "RevisionNotFound")
            elif path.startswith("/api"):
                names = sorted(p.relative_to(files).as_posix() for p in files.rglob("*") if p.is_file())
                info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.answer(json.dumps(info).encode(), {**headers, "Content-Type": "application/json"})
            elif gated:
                self.refuse(403, "GatedRepo")
            else:
                name = path.split("/resolve/")[1].partition("/")[2]
                asked.append(name)
                data = (files / name).read_bytes()
                self.answer(data, {**headers, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

        def answer(self, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in (
        ("ENDPOINT", endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_PROGRESS_BARS", True),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
