"""A stand-in for the Hugging Face hub: the parts of its HTTP interface that an upload and a download use.

It takes every file in the commit itself, where the real hub has large ones sent to its store first. It keeps the
files in memory. What it has not been taught answers 404 and is listed in `unknown`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """One repository's files by name, and the requests that came."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.url = ""

    @property
    def commit(self) -> str:
        """The id of the present state."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@contextmanager
def local_hub() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:  # noqa: C901 (one branch for each address)
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep quiet."""

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                whole = b""
                while size := int(self.rfile.readline(), 16):
                    whole += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return whole
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, content: Any, code: int = 200, **headers: str) -> None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(raw)))
            if not isinstance(content, bytes):
                self.send_header("Content-Type", "application/json")
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        def file(self) -> None:
            name = self.path.partition("?")[0].split("/resolve/")[1].partition("/")[2]
            if name not in hub.files:
                return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            content = hub.files[name]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(content, ETag=etag, X_Repo_Commit=hub.commit)

        def do_HEAD(self) -> None:
            hub.requests.append(("HEAD", self.path))
            self.file()

        def do_GET(self) -> None:
            hub.requests.append(("GET", self.path))
            if "/resolve/" in self.path:
                return self.file()
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in hub.files.items()
            ]
            if "/tree/" in self.path:
                return self.answer(tree)
            if self.path.startswith("/api/models/") and hub.files:
                siblings = [{"rfilename": name} for name in hub.files]
                return self.answer({"id": "me/ours", "sha": hub.commit, "siblings": siblings, "tags": []})
            if self.path != "/api/agent-harnesses":  # asked for by the client's telemetry alone
                hub.unknown.append(("GET", self.path))
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

        def do_POST(self) -> None:
            hub.requests.append(("POST", self.path))
            body = self.body()
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                hub.created.append(json.loads(body))
                return self.answer({"url": f"{hub.url}/me/ours", "id": "1", "name": "me/ours"})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in path:
                modes = [
                    {
                        "path": entry["path"],
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                    }
                    for entry in json.loads(body)["files"]
                ]
                return self.answer({"files": modes})
            if "/commit/" in path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                address = f"{hub.url}/me/ours/commit/{hub.commit}"
                return self.answer({"success": True, "commitUrl": address, "commitOid": hub.commit, "hookOutput": ""})
            hub.unknown.append(("POST", self.path))
            return self.answer({"error": "unknown"}, 404)

    return Handler
