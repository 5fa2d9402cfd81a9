"""A real web server of a folder, with ranges and ETags, that can be slow, broken or gone."""

import re
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


class WebServer:
    """Serves `folder` at `url`; what is asked and sent is counted by the file's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()  # GET requests
        self.sent: Counter[str] = Counter()  # bytes of content
        self.delay = 0.0  # seconds before each answer
        self.cuts_after: int | None = None  # bytes of each answer, then the connection breaks
        self.has_ranges = True
        self.wants: tuple[str, str] | None = None  # a header, without which answers are 401
        self._counting = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, port: int = 0) -> None:
        """Answer requests, at a free port unless it is given."""
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

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Go away; connections are refused from now on."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        time.sleep(self.delay)
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
        request.wfile.write(content)
        with self._counting:
            self.asked[path.name] += 1
            self.sent[path.name] += len(content)


@contextmanager
def serve(folder: Path) -> Iterator[WebServer]:
    """A server of a folder, gone afterwards."""
    server = WebServer(folder)
    try:
        yield server
    finally:
        if server._server is not None:
            server.stop()
