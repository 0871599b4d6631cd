"""A gate in front of a registry: passes requests on, and holds the second half of a blob's content until it is opened.

With it a test sees what is told of a pull before the pull can have ended.
"""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class Gate:
    """Listens at `address` (host and port). A context manager.

    Args:
        registry: host and port of the registry behind it.
        least: length in bytes from which a blob is held.
    """

    def __init__(self, registry: str, least: int) -> None:
        self._opened = threading.Event()
        opened = self._opened

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass_on()

            def do_HEAD(self) -> None:
                self._pass_on()

            def _pass_on(self) -> None:
                connection = http.client.HTTPConnection(registry, timeout=60)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():  # `Accept` stands more than once.
                        connection.putheader(name, value)
                    connection.endheaders()
                    answer = connection.getresponse()
                    content = answer.read()
                finally:
                    connection.close()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                        self.send_header(name, value)
                self.end_headers()
                half = len(content) // 2 if "/blobs/" in self.path and len(content) >= least else len(content)
                self.wfile.write(content[:half])
                if half < len(content):
                    opened.wait(60)
                    self.wfile.write(content[half:])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Let pass what is held, and whatever comes."""
        self._opened.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
