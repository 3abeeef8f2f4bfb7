"""Receive one file from one server into a partial file: resuming, waiting, refusing.

`Transfer.receive(url)` returns when the partial file is complete; it verifies lengths, never the content.
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

LOGIN_PAGE = "an HTML page instead of the file (a login page of the network?)"
log = logging.getLogger(__name__)


class Rejected(Exception):
    """This source is of no use, whether the fault is its answer or its speed: try the next one."""


class Broken(Exception):
    """The connection failed or the server is busy: try again, after `wait` seconds if it named them."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """How long to put up with a source: times in seconds, speed in bytes a second.

    `waits` are the pauses between tries that bring nothing new; a try that brings something starts over
    with the first, up to `tries` in all. A source below `slowest` for a `window` is left for the next one,
    and so is one whose Retry-After exceeds `longest_wait`.
    """

    waits: tuple = (1, 2, 4)
    tries: int = 50
    connect: float = 10
    read: float = 30
    slowest: float = 1000
    window: float = 30
    longest_wait: float = 120
    sleep: Callable = time.sleep


PATIENCE = Patience()


@dataclass
class Transfer:
    """A file on its way into PATH.partial.

    `size` is the size it must have and `limit` the most that is accepted, both None if not known.
    `checkable` says that its hash is known, so that any source may go on where another stopped.
    """

    path: Path
    size: int | None
    limit: int | None
    checkable: bool
    patience: Patience

    def __post_init__(self):
        self.partial = Path(f"{self.path}.partial")
        self.origin = Path(f"{self.path}.origin.partial")  # whose bytes these are, if no hash will tell

    def receive(self, url):
        """Receive until the partial file is complete, with pauses after each failure."""
        failures, furthest = 0, self.arrived()
        for _ in range(self.patience.tries):
            try:
                return self.receive_once(url)
            except Broken as error:
                reason, wait = error, error.wait
            if self.arrived() > furthest:
                failures, furthest = 0, self.arrived()
            if failures == len(self.patience.waits):
                raise Rejected(f"{reason} ({failures + 1} tries)")
            wait = self.patience.waits[failures] if wait is None else wait
            log.warning("%s: %s; next try in %.0f s", url, reason, wait)
            self.patience.sleep(wait)
            failures += 1
        raise Rejected(f"{reason} ({self.patience.tries} tries, {self.arrived():,} bytes so far)")

    def receive_once(self, url):
        offset, headers = self.resume_point(url)
        if self.checkable and offset and offset == self.size:
            return  # complete, though the last run did not come to renaming it
        with connect(url, headers, self.patience) as response:
            offset, total = self.judge(url, response, offset)
            self.require_room(offset, total)
            self.append(arriving(response, self.patience), offset, total)
        if total is not None and self.arrived() < total:
            raise Broken(f"the connection ended after {self.arrived():,} of {total:,} bytes")

    def resume_point(self, url):
        """Return how many bytes are there to be continued, and the headers that ask for the rest.

        With a known hash any source may go on where another stopped. Without, only the same file of the same
        source, by its ETag.
        """
        offset, headers = self.arrived(), {"Accept-Encoding": "identity"}
        if not self.checkable:
            origin = self.read_origin()
            offset = offset if origin.get("url") == url else 0
            headers |= {"If-Range": origin["etag"]} if offset else {}
        elif self.size is not None and offset > self.size:
            self.discard()
            offset = 0
        return offset, headers | ({"Range": f"bytes={offset}-"} if offset else {})

    def judge(self, url, response, offset):
        """Return where the body belongs and the file's total size (None if chunked, so that the end shows).

        Nothing has been written yet. Raises Broken for what may pass, Rejected for what will not.
        """
        status, headers = response.status_code, response.headers
        if status in (408, 425, 429) or status >= 500:
            raise Broken(f"HTTP {status} {response.reason}", retry_after(headers, self.patience))
        start, total = content_range(headers) if status == 206 else (0, headers.get("Content-Length"))
        if status == 416 or (status == 206 and offset and start != offset):
            self.discard()
            raise Broken("the server does not continue where we stopped", wait=0)
        if status not in (200, 206) or start not in (0, offset):
            raise Rejected(f"HTTP {status} {response.reason}")
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise Rejected(f"redirected to {response.url}, which is not encrypted")
        if "html" in headers.get("Content-Type", ""):
            raise Rejected(LOGIN_PAGE)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Rejected("the server compresses the file, so that its length cannot be checked")
        total = self.agree(headers, int(total) if str(total).isdigit() else None)
        if start == 0 and not self.checkable:
            self.remember(url, headers.get("ETag", ""))
        return start, total

    def agree(self, headers, total):
        """Return the size to expect, from the server's and the table's."""
        if total is None and self.size is None and "chunked" not in headers.get("Transfer-Encoding", ""):
            raise Rejected("the server states no length, so that a short file could not be told")
        if total is not None and self.size not in (None, total):
            raise Rejected(f"the server offers {total:,} bytes instead of {self.size:,}")
        if total is not None and self.limit is not None and total > self.limit:
            raise Rejected(f"the server offers {total:,} bytes, too many for this file")
        return self.size if total is None else total

    def remember(self, url, etag):
        """Note whose bytes follow. The old ones go first, so that they never pass for this source's."""
        self.discard()
        if etag.startswith('"'):  # a weak one, W/"…", does not promise equal bytes
            self.origin.write_text(json.dumps({"url": url, "etag": etag}), encoding="utf-8")

    def read_origin(self):
        try:
            return json.loads(self.origin.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: cut off while it was written
            return {}

    def require_room(self, offset, total):
        if total is not None and total - offset > shutil.disk_usage(self.path.parent).free:
            raise OSError(errno.ENOSPC, f"{total - offset:,} more bytes do not fit on the disk")

    def append(self, chunks, offset, total):
        """Write the body behind the first `offset` bytes, never more than `total` or the limit in all."""
        limit = self.limit if total is None else total
        with open(self.partial, "ab" if offset else "wb") as file, tqdm(
            desc=self.path.name, total=total, initial=offset, unit="B", unit_scale=True, leave=False,
            disable=not someone_watches(sys.stderr),
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

    def arrived(self):
        return self.partial.stat().st_size if self.partial.exists() else 0

    def rename(self):
        os.replace(self.partial, self.path)
        self.origin.unlink(missing_ok=True)

    def discard(self):
        self.partial.unlink(missing_ok=True)
        self.origin.unlink(missing_ok=True)


def someone_watches(stream):
    """Return whether the stream is a terminal's or a notebook's, and not a log."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel")


@contextmanager
def connect(url, headers, patience):
    """Open `url`; proxies and certificates come from the usual environment variables, by requests."""
    try:
        response = requests.get(
            url, headers=headers, stream=True, timeout=(patience.connect, patience.read)
        )
    except requests.exceptions.SSLError as error:
        raise Rejected(f"no secure connection: {plain(error)}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Broken(plain(error)) from error
    except (OSError, ValueError) as error:  # among them requests' own, and a missing CA bundle
        raise Rejected(plain(error)) from error
    with response:
        yield response


def arriving(response, patience):
    """Yield the body as it comes. Raises Broken if it breaks off, Rejected if it is far too slow."""
    since, received = time.monotonic(), 0
    try:
        while chunk := response.raw.read1(CHUNK, decode_content=False):
            yield chunk
            received += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed > patience.window:
                if received < patience.slowest * elapsed:
                    raise Rejected(f"too slow: {received:,} bytes in {elapsed:.0f} s")
                since, received = time.monotonic(), 0
    except urllib3.exceptions.ProtocolError as error:
        raise Broken(f"the connection broke off: {plain(error)}") from error
    except urllib3.exceptions.HTTPError as error:
        raise Broken(plain(error)) from error


def content_range(headers):
    """Read "bytes 100-999/1000" as (100, 1000); "*" or nonsense as None."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def retry_after(headers, patience):
    """Return Retry-After in seconds, None without it; raise Rejected if that is too long to wait."""
    text = headers.get("Retry-After", "").strip()
    try:
        wait = int(text) if text.isdigit() else seconds_until(parsedate_to_datetime(text))
    except (TypeError, ValueError):
        return None
    if wait > patience.longest_wait:
        raise Rejected(f"the server is busy and asks to come back in {wait:.0f} s")
    return max(0, wait)


def seconds_until(moment):
    return (moment - datetime.now(timezone.utc)).total_seconds()


def plain(error):
    """Return the text of an error of requests or urllib3 without its wrapping: the innermost reason."""
    inner = [part for part in (getattr(error, "reason", None), *error.args) if isinstance(part, Exception)]
    if inner:
        return plain(inner[0])
    return re.sub(r"^\w+\(host=.*?\): ", "", str(error))
