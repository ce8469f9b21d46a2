"""A registry of container images with one image, read-only: what a pull asks for, and no more.

See the OCI distribution specification 1.1, "Pulling manifests" and "Pulling blobs".
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT = 5000


@contextmanager
def registry(layout: Path) -> Iterator[None]:
    """Serve the image of an OCI layout under any name, on loopback, for the duration of a block."""
    manifest = json.loads((layout / "index.json").read_text())["manifests"][0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            kind, _, wanted = self.path.rpartition("/")
            if self.path == "/v2/":
                self._send(b"{}", "application/json")
            elif kind.endswith("/manifests"):
                self._send(_blob(layout, manifest["digest"]), manifest["mediaType"])
            else:
                self._send(_blob(layout, wanted), "application/octet-stream")

        do_HEAD = do_GET  # noqa: N815

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Docker-Content-Digest", manifest["digest"])
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", PORT), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def _blob(layout: Path, digest: str) -> bytes:
    algorithm, _, name = digest.partition(":")
    return (layout / "blobs" / algorithm / name).read_bytes()
