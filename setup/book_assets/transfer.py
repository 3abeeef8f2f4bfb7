"""Receive one file from one server into a partial file: resume, wait and retry, reject bad responses.

`Transfer.receive(url)` returns when the partial file is complete; it checks lengths, never the content.
"""

import errno
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from book_assets.archives import CHUNK

LOGIN_PAGE = "an HTML page instead of the file (the network's login page?)"
log = logging.getLogger(__name__)


class Rejected(Exception):
    """The source cannot provide the file: it is missing, wrong or too slow. Try the next source."""


class TransientError(Exception):
    """The connection failed or the server is busy: try again, after `wait` seconds if it sent Retry-After."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to try one source: times in seconds, speed in bytes per second."""

    waits: tuple = (1, 2, 4)  # pauses after tries without progress; after progress, the first again
    tries: int = 50  # in all
    connect: float = 10  # timeouts: until the connection is made, and between two reads
    read: float = 30
    slowest: float = 1000  # a source slower than this for `window` seconds is abandoned
    window: float = 30
    longest_wait: float = 120  # a source with a longer Retry-After is abandoned
    sleep: Callable = time.sleep


RETRY = RetryPolicy()


@dataclass
class Transfer:
    """The download of one file into PATH.partial."""

    path: Path
    size: int | None  # the file's size in bytes, None if it is not known
    limit: int | None  # the largest size that is accepted, None for any
    checkable: bool  # its hash is known, so any source may continue what another began
    retry: RetryPolicy

    def __post_init__(self):
        self.partial = Path(f"{self.path}.partial")
        self.origin = Path(f"{self.path}.origin.partial")  # the source of a file without a known hash

    def receive(self, url):
        """Receive until the partial file is complete, with a pause after each failure."""
        failures = 0
        furthest = self.bytes_received()
        for _ in range(self.retry.tries):
            try:
                return self.receive_once(url)
            except TransientError as error:
                reason = error
            if self.bytes_received() > furthest:
                failures = 0
                furthest = self.bytes_received()
            if failures == len(self.retry.waits):
                raise Rejected(f"{reason} ({failures + 1} tries)")
            wait = self.retry.waits[failures] if reason.wait is None else reason.wait
            log.warning("%s: %s; trying again in %.0f s", url, reason, wait)
            self.retry.sleep(wait)
            failures += 1
        raise Rejected(f"{reason} ({self.retry.tries} tries, {self.bytes_received():,} bytes so far)")

    def receive_once(self, url):
        """Try once. Raises TransientError if another try may help, Rejected if not."""
        offset, headers = self.resume_point(url)
        if self.checkable and offset and offset == self.size:
            return  # complete, but the last run ended before renaming it
        with connect(url, headers, self.retry) as response:
            offset, total = self.check_response(url, response, offset)
            self.require_room(offset, total)
            self.append(read_chunks(response, self.retry), offset, total)
        if total is not None and self.bytes_received() < total:
            raise TransientError(f"the connection ended after {self.bytes_received():,} of {total:,} bytes")

    def resume_point(self, url):
        """Return how many bytes to keep, and the request headers that ask for the rest.

        With a known hash any source may continue what another began. Without one, only the same source
        may, and only if its ETag is still the same.
        """
        offset = self.bytes_received()
        headers = {"Accept-Encoding": "identity"}
        if not self.checkable:
            origin = self.read_origin()
            offset = offset if origin.get("url") == url else 0
            headers |= {"If-Range": origin["etag"]} if offset else {}
        elif self.size is not None and offset > self.size:
            self.discard()
            offset = 0
        return offset, headers | ({"Range": f"bytes={offset}-"} if offset else {})

    def check_response(self, url, response, offset):
        """Return the body's offset in the file and the file's size in bytes.

        The size is None for a chunked response of unknown length. Nothing has been written yet. Raises
        TransientError if another try may help, Rejected if not.
        """
        status = response.status_code
        headers = response.headers
        if status in (408, 425, 429) or status >= 500:
            raise TransientError(f"HTTP {status} {response.reason}", retry_after(headers, self.retry))
        start, total = content_range(headers) if status == 206 else (0, headers.get("Content-Length"))
        if status == 416 or (status == 206 and offset and start != offset):
            self.discard()
            raise TransientError("the server cannot resume where the download stopped", wait=0)
        if status not in (200, 206) or start not in (0, offset):
            raise Rejected(f"HTTP {status} {response.reason}")
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise Rejected(f"redirected to {response.url}, which is not encrypted")
        if "html" in headers.get("Content-Type", ""):
            raise Rejected(LOGIN_PAGE)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Rejected("the server compresses the file, so its length cannot be checked")
        total = self.expected_size(headers, int(total) if str(total).isdigit() else None)
        if start == 0 and not self.checkable:
            self.record_origin(url, headers.get("ETag", ""))
        return start, total

    def expected_size(self, headers, total):
        """Return the file's size as the server or the table states it; raise Rejected if they disagree."""
        if total is None and self.size is None and "chunked" not in headers.get("Transfer-Encoding", ""):
            raise Rejected("the server states no length, so a truncated file would go unnoticed")
        if total is not None and self.size not in (None, total):
            raise Rejected(f"the server offers {total:,} bytes instead of {self.size:,}")
        if total is not None and self.limit is not None and total > self.limit:
            raise Rejected(f"the server offers {total:,} bytes, too many for this file")
        return self.size if total is None else total

    def record_origin(self, url, etag):
        """Discard the old bytes, then record the source of the new ones: the two must never be mixed."""
        self.discard()
        if etag.startswith('"'):  # not a weak ETag, W/"…", which does not promise equal bytes
            self.origin.write_text(json.dumps({"url": url, "etag": etag}), encoding="utf-8")

    def read_origin(self):
        try:
            return json.loads(self.origin.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: the record is truncated
            return {}

    def require_room(self, offset, total):
        if total is not None and total - offset > shutil.disk_usage(self.path.parent).free:
            raise OSError(errno.ENOSPC, f"{total - offset:,} more bytes do not fit on the disk")

    def append(self, chunks, offset, total):
        """Write the body after the first `offset` bytes, never beyond `total` or the limit."""
        limit = self.limit if total is None else total
        with open(self.partial, "ab" if offset else "wb") as file, tqdm(
            desc=self.path.name, total=total, initial=offset, unit="B", unit_scale=True, leave=False,
            disable=not is_interactive(sys.stderr),
        ) as bar:
            for chunk in chunks:
                offset += len(chunk)
                if limit is not None and offset > limit:
                    break
                file.write(chunk)
                bar.update(len(chunk))
        if limit is not None and offset > limit:
            self.discard()
            raise Rejected(f"the server sends more than {limit:,} bytes")

    def bytes_received(self):
        return self.partial.stat().st_size if self.partial.exists() else 0

    def rename(self):
        os.replace(self.partial, self.path)
        self.origin.unlink(missing_ok=True)

    def discard(self):
        self.partial.unlink(missing_ok=True)
        self.origin.unlink(missing_ok=True)


def is_interactive(stream):
    """Return whether a person sees the stream: a terminal or a notebook, not a log file."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel")


@contextmanager
def connect(url, headers, retry):
    """Open `url`. requests takes proxies and certificates from the usual environment variables."""
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=(retry.connect, retry.read))
    except requests.exceptions.SSLError as error:
        raise Rejected(f"no secure connection: {error_text(error)}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise TransientError(error_text(error)) from error
    except (OSError, ValueError) as error:  # includes requests' own errors and a missing CA bundle
        raise Rejected(error_text(error)) from error
    with response:
        yield response


def read_chunks(response, retry):
    """Yield the body in chunks; raise TransientError if the connection breaks, Rejected if it is too slow."""
    since = time.monotonic()
    received = 0
    try:
        while chunk := response.raw.read1(CHUNK, decode_content=False):
            yield chunk
            received += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed > retry.window:
                if received < retry.slowest * elapsed:
                    raise Rejected(f"too slow: {received:,} bytes in {elapsed:.0f} s")
                since = time.monotonic()
                received = 0
    except urllib3.exceptions.ProtocolError as error:
        raise TransientError(f"the connection broke off: {error_text(error)}") from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(error_text(error)) from error


def content_range(headers):
    """Return Content-Range "bytes 100-999/1000" as (100, 1000), with None for "*" or an invalid header."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def retry_after(headers, retry):
    """Return Retry-After in seconds, None without the header; raise Rejected if the wait is too long."""
    text = headers.get("Retry-After", "").strip()
    try:
        wait = int(text) if text.isdigit() else seconds_until(parsedate_to_datetime(text))
    except (TypeError, ValueError):
        return None
    if wait > retry.longest_wait:
        raise Rejected(f"the server is busy and asks to come back in {wait:.0f} s")
    return max(0, wait)


def seconds_until(moment):
    return (moment - datetime.now(timezone.utc)).total_seconds()


def error_text(error):
    """Return the message of the innermost error that an error of requests or urllib3 wraps."""
    inner = [part for part in (getattr(error, "reason", None), *error.args) if isinstance(part, Exception)]
    if inner:
        return error_text(inner[0])
    return re.sub(r"^\w+\(host=.*?\): ", "", str(error))
