"""A server on 127.0.0.1 that serves files with the fault named in the URL, and records the requests.

    with Server({"a.bin": data}) as server:
        server.url("a.bin", "status=404")     # the faults are methods of Handler
        server.requests                       # path, Range and bytes sent of each request
"""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = 1 << 16


@dataclass
class Request:
    path: str
    range: str | None
    sent: int = 0  # bytes of the body


class Server:
    def __init__(self, files):
        self.files = files
        self.requests = []
        self.stopping = threading.Event()

    def url(self, name, fault="good"):
        return f"http://127.0.0.1:{self.port}/{fault}/{name}"

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.owner = self
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()


class Zeros:
    """A file of `size` zeros that takes no memory."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.size)
        return bytes(stop - start)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server.owner
        *_, fault, name = self.path.split("/")  # a proxy gets the whole URL
        word, _, argument = fault.partition("=")
        self.request_log = Request(self.path, self.headers.get("Range"))
        server.requests.append(self.request_log)
        self.number = sum(request.path == self.path for request in list(server.requests))
        self.data = server.files[name]
        self.argument = argument
        with suppress(BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
            getattr(self, word)()
        self.close_connection = True

    def first_byte(self):
        value = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        condition = self.headers.get("If-Range", '"v1"')
        return int(value.rstrip("-")) if condition == '"v1"' else 0

    def start(self, status, length=None, **headers):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in {"Content_Type": "application/octet-stream", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def body(self, data, start=0, stop=None, piece=PIECE):
        stop = len(data) if stop is None else stop
        for at in range(start, stop, piece):
            chunk = data[at : min(at + piece, stop)]
            self.request_log.sent += len(chunk)  # before the write: the client may finish before it returns
            self.wfile.write(chunk)

    def from_range(self, stop=None, etag='"v1"', **headers):
        """Send the requested range, or the whole file, up to byte `stop`; then close the connection."""
        first, size = self.first_byte(), len(self.data)
        if first >= size:
            return self.start(416, 0)
        if first:
            headers["Content_Range"] = f"bytes {first}-{size - 1}/{size}"
        self.start(206 if first else 200, size - first, ETag=etag, **headers)
        self.body(self.data, first, stop)

    def good(self):
        self.from_range()

    def drops(self):
        """Close the connection after every tenth of the file."""
        tenth = -(-len(self.data) // 10)
        self.from_range(stop=min(len(self.data), (self.first_byte() // tenth + 1) * tenth))

    def drops_norange(self):
        """Close the connection in the middle, `argument` times, and never resume."""
        self.start(200, len(self.data))
        self.body(self.data, 0, len(self.data) // 2 if self.number <= int(self.argument) else None)

    def drops_weak(self):
        """Close the connection once, with a weak ETag."""
        self.from_range(stop=len(self.data) // 2 if self.number == 1 else None, etag='W/"v1"')

    def changes(self):
        """Close the connection once; at the second request the file and its ETag are different."""
        if self.number == 1:
            return self.from_range(stop=len(self.data) // 2, etag='"v0"')
        self.from_range()

    def ignores_range(self):
        self.start(200, len(self.data))
        self.body(self.data)

    def wrong_range(self):
        """Send another range than the requested one."""
        first, size = self.first_byte(), len(self.data)
        if not first:
            return self.from_range()
        self.start(206, size - 1, Content_Range=f"bytes 1-{size - 1}/{size}")
        self.body(self.data, 1)

    def too_much(self):
        self.start(200, len(self.data) + 1000)
        self.body(self.data + bytes(1000))

    def too_much_unsaid(self):
        self.start(200)
        self.body(self.data + bytes(10 * PIECE))

    def too_little(self):
        self.start(200, len(self.data) - 1000)
        self.body(self.data[:-1000])

    def too_little_unsaid(self):
        self.start(200)
        self.body(self.data[:-1000])

    def wrong_bytes(self):
        self.start(200, len(self.data))
        self.body(bytes(len(self.data)))

    def html(self):
        self.start(200, 9000, Content_Type="text/html")
        self.body(b"<!DOCTYPE html><title>Log in</title>".ljust(9000))

    def html_disguised(self):
        """A login page of exactly the right size, called application/octet-stream."""
        self.start(200, len(self.data))
        self.body(b"\n<!doctype html><title>Log in</title>".ljust(len(self.data)))

    def status(self):
        self.start(int(self.argument), 0)

    def retry_after(self):
        """Send 429 once, with `argument` as Retry-After, then the file."""
        if self.number == 1:
            return self.start(429, 0, Retry_After=self.argument.replace("_", " "))
        self.from_range()

    def recovers(self):
        """Send 500 `argument` times, then the file."""
        if self.number <= int(self.argument):
            return self.start(500, 0)
        self.from_range()

    def no_length(self):
        self.start(200)
        self.body(self.data)

    def chunked(self, stop=None):
        self.protocol_version = "HTTP/1.1"
        self.start(200, Transfer_Encoding="chunked")
        for at in range(0, len(self.data), PIECE):
            chunk = self.data[at : at + PIECE]
            self.request_log.sent += len(chunk)
            self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        if stop is None:
            self.wfile.write(b"0\r\n\r\n")

    def chunked_cut(self):
        self.chunked(stop=True)

    def compressed(self):
        self.start(200, len(self.data), Content_Encoding="gzip")
        self.body(self.data)

    def hangs(self):
        """Send a tenth, then nothing more."""
        self.start(200, len(self.data))
        self.body(self.data, 0, len(self.data) // 10)
        self.server.owner.stopping.wait(60)

    def trickles(self):
        """Send one byte every 20 ms, so that no read times out."""
        self.start(200, len(self.data))
        for at in range(len(self.data)):
            if self.server.owner.stopping.wait(0.02):
                return
            self.body(self.data, at, at + 1)

    def slow(self):
        """Send 64 kB every 50 ms."""
        first = self.first_byte()
        headers = {"Content_Range": f"bytes {first}-{len(self.data) - 1}/{len(self.data)}"} if first else {}
        self.start(206 if first else 200, len(self.data) - first, ETag='"v1"', **headers)
        for at in range(first, len(self.data), PIECE):
            self.body(self.data, at, min(at + PIECE, len(self.data)))
            time.sleep(0.05)

    def redirect(self):
        self.start(302, 0, Location=self.path.replace("/redirect/", "/good/"))

    def redirect_forever(self):
        self.start(302, 0, Location=self.path)
