"""Whatever a server does, the file is complete, and each fault is retried or reported."""

import io
import re
import sys
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from book_assets.downloads import DownloadError, fetch
from book_assets.transfer import Rejected, Transfer
from download_helpers import DATA, assert_fetched, asset, files

TEMPORARY = {  # fault: the pauses it causes
    "good": [],
    "redirect": [],
    "no_length": [],
    "chunked": [],
    "ignores_range": [],
    "drops": [1] * 9,
    "drops_norange=3": [1, 2, 4],
    "recovers=1": [1],
    "recovers=3": [1, 2, 4],
    "retry_after=7": [7],
}
PERMANENT = {  # fault: what the report says, and whether all pauses were used
    "drops_norange=99": (r"Incomplete|IncompleteRead", True),
    "too_much": (r"offers 668,705 bytes instead of 667,705", False),
    "too_much_unsaid": (r"more than 667,705 bytes", False),
    "too_little": (r"offers 666,705 bytes instead of 667,705", False),
    "too_little_unsaid": (r"ended after 666,705 of 667,705", True),
    "wrong_bytes": (r"SHA-256 [0-9a-f]{16}… instead of", False),
    "html": (r"HTML page", False),
    "html_disguised": (r"HTML page", False),
    "compressed": (r"compresses", False),
    "status=403": (r"HTTP 403", False),
    "status=404": (r"HTTP 404", False),
    "status=410": (r"HTTP 410", False),
    "status=204": (r"HTTP 204", False),
    "status=408": (r"HTTP 408", True),
    "status=429": (r"HTTP 429", True),
    "status=500": (r"HTTP 500", True),
    "status=503": (r"HTTP 503", True),
    "retry_after=3600": (r"come back in 3600 s", False),
    "hangs": (r"timed out", True),
    "trickles": (r"too slow", False),
    "redirect_forever": (r"[Rr]edirect", False),
}
HASTY = ("hangs", "trickles")


@pytest.mark.parametrize("fault", TEMPORARY)
def test_a_temporary_fault_is_retried(fault, server, retry, pauses, tmp_path):
    assert_fetched(fetch(asset(server.url("a.bin", fault)), tmp_path, retry))
    assert pauses == TEMPORARY[fault]


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_permanent_fault_is_reported(fault, server, retry, hasty_retry, pauses, tmp_path):
    says, all_used = PERMANENT[fault]
    url = server.url("a.bin", fault)
    with pytest.raises(DownloadError, match=f"(?s){re.escape(url)}\n.*{says}"):
        fetch(asset(url), tmp_path, hasty_retry if fault in HASTY else retry)
    assert set(files(tmp_path)) <= {"a.bin.partial"}
    assert pauses[-3:] == ([1, 2, 4] if all_used else [])


@pytest.mark.parametrize("fault", PERMANENT)
def test_after_a_faulty_source_the_next_one_is_used(fault, server, retry, hasty_retry, tmp_path):
    first, second = server.url("a.bin", fault), server.url("a.bin")
    assert_fetched(fetch(asset(first, second), tmp_path, hasty_retry if fault in HASTY else retry))
    assert server.requests[-1].path.startswith("/good/")


def test_retry_after_may_be_a_date(server, retry, pauses, tmp_path):
    moment = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    url = server.url("a.bin", f"retry_after={moment.replace(' ', '_')}")
    assert_fetched(fetch(asset(url), tmp_path, retry))
    assert len(pauses) == 1 and 50 < pauses[0] <= 60


# Resuming


def test_only_the_rest_is_transferred(server, retry, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    assert_fetched(fetch(asset(server.url("a.bin")), tmp_path, retry))
    assert [(r.range, r.sent) for r in server.requests] == [("bytes=400000-", len(DATA) - 400_000)]


def test_another_source_resumes_where_the_first_stopped(server, hasty_retry, tmp_path):
    sources = server.url("a.bin", "hangs"), server.url("a.bin")
    assert_fetched(fetch(asset(*sources), tmp_path, hasty_retry))
    assert server.requests[-1].range == f"bytes={len(DATA) // 10}-"


def test_a_range_answered_with_the_whole_file_starts_over(server, retry, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    assert_fetched(fetch(asset(server.url("a.bin", "ignores_range")), tmp_path, retry))
    assert [(r.range, r.sent) for r in server.requests] == [("bytes=400000-", len(DATA))]


def test_a_range_answered_with_another_range_starts_over(server, retry, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    assert_fetched(fetch(asset(server.url("a.bin", "wrong_range")), tmp_path, retry))
    assert [r.range for r in server.requests] == ["bytes=400000-", None]


def test_a_login_page_does_not_delete_the_partial_file(server, retry, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    with pytest.raises(DownloadError, match=r"400,000 bytes received are kept"):
        fetch(asset(server.url("a.bin", "html"), server.url("a.bin", "status=404")), tmp_path, retry)
    assert (tmp_path / "a.bin.partial").read_bytes() == DATA[:400_000]


@pytest.mark.parametrize("content", [b"x" * 400_000, b"x" * len(DATA), b"x" * (len(DATA) + 5)])
def test_a_damaged_partial_file_is_downloaded_again(content, server, retry, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(content)
    assert_fetched(fetch(asset(server.url("a.bin")), tmp_path, retry))


# Company networks, terminals


def test_proxies_come_from_the_environment(server, retry, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    assert_fetched(fetch(asset("http://files.invalid/good/a.bin"), tmp_path, retry))


def test_the_certificates_come_from_the_environment(server, retry, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    url = server.url("a.bin").replace("http:", "https:")
    with pytest.raises(DownloadError, match=r"missing\.pem"):
        fetch(asset(url), tmp_path / "folder", retry)


def test_a_server_without_a_certificate_is_refused_at_once(server, retry, pauses, tmp_path):
    url = server.url("a.bin").replace("http:", "https:")
    with pytest.raises(DownloadError, match="no secure connection"):
        fetch(asset(url), tmp_path, retry)
    assert pauses == []


def test_a_redirect_from_https_to_http_is_refused(retry, tmp_path):
    transfer = Transfer(tmp_path / "a.bin", len(DATA), len(DATA), True, retry)
    answer = SimpleNamespace(status_code=200, reason="OK", headers={}, url="http://example.org/a.bin")
    with pytest.raises(Rejected, match="not encrypted"):
        transfer.check_response("https://example.org/a.bin", answer, 0)


def test_the_progress_bar_shows_only_in_terminals(server, retry, tmp_path, monkeypatch, capsys):
    fetch(asset(server.url("a.bin")), tmp_path / "log", retry)
    assert capsys.readouterr() == ("", "")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(asset(server.url("a.bin", "slow")), tmp_path / "terminal", retry)
    assert re.search(r"a\.bin:\s+\d+%.*/668k \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", terminal.getvalue())
