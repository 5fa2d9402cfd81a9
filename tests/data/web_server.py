"""A real web server of a folder, with ranges and ETags, that can be slow, broken or gone."""

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GONE = "gone"
"""While the folder has such a file, connections are closed without an answer."""

SILENT = "silent"
"""While the folder has such a file, nothing is answered."""


def hold_port() -> socket.socket:
    """A socket with a free port that nobody else is given: it doesn't listen, so connections are
    refused until a server does that is bound there too."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


class WebServer:
    """Serves `folder` at `url`; what is asked and sent is counted by the file's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()  # GET requests
        self.sent: Counter[str] = Counter()  # bytes of content
        self.delay = 0.0  # seconds before each answer
        self.cuts_after: int | None = None  # bytes of each answer, then the connection breaks
        self.has_ranges = True
        self.gate = threading.Event()  # answers wait until it is set
        self.gate.set()
        self.piece = 0  # bytes after which an answer pauses for `delay` again; 0 for never
        self.wants: tuple[str, str] | None = None  # a header, without which answers are 401
        self.most_at_once = 0  # requests that waited for their answer together
        self._at_once = 0
        self._counting = threading.Lock()
        self._port = hold_port()
        self.port: int = self._port.getsockname()[1]
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Answer requests from now on."""
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer leaves in one go

            def do_HEAD(self) -> None:
                web.answer(self, with_body=False)

            def do_GET(self) -> None:
                web.answer(self, with_body=True)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 1024  # a step's ranges come all at once

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Go away, if it is there; connections are refused from now on."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def close(self) -> None:
        """Go away for good."""
        self.stop()
        self._port.close()

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        with self._counting:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.delay)
        self.gate.wait()
        with self._counting:
            self._at_once -= 1
        while (self.folder / SILENT).exists() and self._server is not None:
            time.sleep(0.05)
        if self._server is None or (self.folder / GONE).exists():
            request.close_connection = True
            return
        if self.wants is not None and request.headers.get(self.wants[0]) != self.wants[1]:
            request.send_error(401)
            return
        path = self.folder / request.path.lstrip("/")
        if not path.is_file():
            request.send_error(404)
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{md5(content).hexdigest()}"'}
        status = 200
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if found and self.has_ranges and int(found[1]) >= len(content):
            request.send_error(416)
            return
        if found and self.has_ranges:
            status, (first, last) = 206, (int(found[1]), min(int(found[2]), len(content) - 1))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if not with_body:
            return
        if self.cuts_after is not None:
            content, request.close_connection = content[: self.cuts_after], True
        with self._counting:  # before: who has the answer may look at once
            self.asked[path.name] += 1
            self.sent[path.name] += len(content)
        for start in range(0, len(content), self.piece or len(content) or 1):
            time.sleep(self.delay if start else 0.0)
            request.wfile.write(content[start:][: self.piece or None])
            request.wfile.flush()


@contextmanager
def serve(folder: Path) -> Iterator[WebServer]:
    """A server of a folder, gone afterwards."""
    server = WebServer(folder)
    try:
        yield server
    finally:
        server.close()
