"""Whatever a server does, what arrives is whole, and each fault is waited for or reported."""

import io
import re
import sys
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

import download_helpers
from book_assets.downloads import DownloadError, fetch
from book_assets.transfer import Rejected, Transfer
from download_helpers import DATA, assert_fetched, asset, files

naps, patience, haste = download_helpers.naps, download_helpers.patience, download_helpers.haste
running_server, server = download_helpers.running_server, download_helpers.server

PASSING = {  # fault: the pauses it costs
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
FAILING = {  # fault: what the report says of it, whether the pauses were used up
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


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_waited_for(fault, server, patience, naps, tmp_path):
    assert_fetched(fetch(asset(server.url("a.bin", fault)), tmp_path, patience))
    assert naps == PASSING[fault]


@pytest.mark.parametrize("fault", FAILING)
def test_a_fault_that_stays_is_reported(fault, server, patience, haste, naps, tmp_path):
    says, tired = FAILING[fault]
    url = server.url("a.bin", fault)
    with pytest.raises(DownloadError, match=f"(?s){re.escape(url)}\n.*{says}"):
        fetch(asset(url), tmp_path, haste if fault in HASTY else patience)
    assert set(files(tmp_path)) <= {"a.bin.partial"}
    assert naps[-3:] == ([1, 2, 4] if tired else [])


@pytest.mark.parametrize("fault", FAILING)
def test_after_a_faulty_source_the_next_one_delivers(fault, server, patience, haste, tmp_path):
    first, second = server.url("a.bin", fault), server.url("a.bin")
    assert_fetched(fetch(asset(first, second), tmp_path, haste if fault in HASTY else patience))
    assert server.requests[-1].path.startswith("/good/")


def test_retry_after_may_be_a_date(server, patience, naps, tmp_path):
    moment = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    url = server.url("a.bin", f"retry_after={moment.replace(' ', '_')}")
    assert_fetched(fetch(asset(url), tmp_path, patience))
    assert len(naps) == 1 and 50 < naps[0] <= 60


# Going on where it stopped


def test_only_the_rest_is_transferred(server, patience, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    assert_fetched(fetch(asset(server.url("a.bin")), tmp_path, patience))
    assert [(r.range, r.sent) for r in server.requests] == [("bytes=400000-", len(DATA) - 400_000)]


def test_another_source_goes_on_where_the_first_stopped(server, haste, tmp_path):
    sources = server.url("a.bin", "hangs"), server.url("a.bin")
    assert_fetched(fetch(asset(*sources), tmp_path, haste))
    assert server.requests[-1].range == f"bytes={len(DATA) // 10}-"


def test_a_range_answered_with_the_whole_file_starts_over(server, patience, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    assert_fetched(fetch(asset(server.url("a.bin", "ignores_range")), tmp_path, patience))
    assert [(r.range, r.sent) for r in server.requests] == [("bytes=400000-", len(DATA))]


def test_a_range_answered_with_another_range_starts_over(server, patience, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    assert_fetched(fetch(asset(server.url("a.bin", "wrong_range")), tmp_path, patience))
    assert [r.range for r in server.requests] == ["bytes=400000-", None]


def test_a_login_page_does_not_cost_what_has_arrived(server, patience, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(DATA[:400_000])
    with pytest.raises(DownloadError, match=r"400,000 bytes\) is kept"):
        fetch(asset(server.url("a.bin", "html"), server.url("a.bin", "status=404")), tmp_path, patience)
    assert (tmp_path / "a.bin.partial").read_bytes() == DATA[:400_000]


@pytest.mark.parametrize("rubbish", [b"x" * 400_000, b"x" * len(DATA), b"x" * (len(DATA) + 5)])
def test_a_spoilt_partial_file_is_fetched_anew(rubbish, server, patience, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(rubbish)
    assert_fetched(fetch(asset(server.url("a.bin")), tmp_path, patience))


# Networks of companies, terminals


def test_proxies_come_from_the_environment(server, patience, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    assert_fetched(fetch(asset("http://files.invalid/good/a.bin"), tmp_path, patience))


def test_the_certificates_come_from_the_environment(server, patience, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    url = server.url("a.bin").replace("http:", "https:")
    with pytest.raises(DownloadError, match=r"missing\.pem"):
        fetch(asset(url), tmp_path / "folder", patience)


def test_a_server_without_a_certificate_is_refused_at_once(server, patience, naps, tmp_path):
    url = server.url("a.bin").replace("http:", "https:")
    with pytest.raises(DownloadError, match="no secure connection"):
        fetch(asset(url), tmp_path, patience)
    assert naps == []


def test_a_redirect_from_https_to_http_is_refused(patience, tmp_path):
    transfer = Transfer(tmp_path / "a.bin", len(DATA), len(DATA), True, patience)
    answer = SimpleNamespace(status_code=200, reason="OK", headers={}, url="http://example.org/a.bin")
    with pytest.raises(Rejected, match="not encrypted"):
        transfer.judge("https://example.org/a.bin", answer, 0)


def test_the_progress_bar_shows_only_in_terminals(server, patience, tmp_path, monkeypatch, capsys):
    fetch(asset(server.url("a.bin")), tmp_path / "log", patience)
    assert capsys.readouterr() == ("", "")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(asset(server.url("a.bin", "slow")), tmp_path / "terminal", patience)
    assert re.search(r"a\.bin:\s+\d+%.*/668k \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", terminal.getvalue())
