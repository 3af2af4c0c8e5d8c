"""A hub on loopback: directories served as repositories, some of them gated, as huggingface.co answers for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@contextmanager
def serve_hub(repositories: Mapping[str, Path], gated: Collection[str] = ()) -> Iterator[str]:
    """The address of a hub with these repositories (directories by `owner/name`)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                name = "/".join(path.removeprefix("api/models/").split("/")[:2])
                if name not in repositories:
                    return self.say(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
                root = repositories[name]
                files = [p for p in sorted(root.rglob("*")) if p.is_file()]
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": str(p.relative_to(root)), "size": p.stat().st_size, "oid": p.name}
                        for p in files
                    ]
                    return self.say(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
                siblings = [{"rfilename": str(p.relative_to(root)), "size": p.stat().st_size} for p in files]
                said = {"id": name, "sha": COMMIT, "siblings": siblings, "gated": name in gated}
                return self.say(200, json.dumps(said).encode(), {"Content-Type": "application/json"}, body)
            if path.count("/") < 3:
                return self.say(404, b"", {}, body)
            owner, repository, _, _, *rest = path.split("/")
            name = f"{owner}/{repository}"
            if name in gated:
                return self.say(
                    403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, body
                )
            file = repositories[name].joinpath(*rest)
            if not file.is_file():
                return self.say(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            data = file.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self.say(200, data, {"X-Repo-Commit": COMMIT, "ETag": etag}, body)

        def say(self, code: int, data: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
