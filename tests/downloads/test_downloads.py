"""A file has its final name only when it is complete and verified."""

import errno
import io
import os
import subprocess
from types import SimpleNamespace

import pytest

from book_assets import downloads, transfer
from book_assets.downloads import DownloadError, fetch
from book_assets.table import Asset
from download_helpers import (
    DATA,
    SHA256,
    ZEROS,
    ZEROS_SHA256,
    assert_fetched,
    asset,
    files,
    in_child,
    unpinned,
    wait_until,
)
from misbehaving_server import PIECE, Server


def test_the_report_names_every_source_and_every_remedy(server, retry, tmp_path):
    gone, broken = server.url("a.bin", "status=404"), server.url("a.bin", "status=500")
    with pytest.raises(DownloadError) as error:
        fetch(asset(gone, broken), tmp_path, retry)
    report = str(error.value)
    for text in (
        gone, "HTTP 404", broken, "HTTP 500", "(4 tries)", "LLM_ASSETS=embedded", "--assets embedded",
        str(tmp_path / "a.bin"), "667,705 bytes", SHA256, "HTTPS_PROXY", "REQUESTS_CA_BUNDLE",
    ):
        assert text in report


def test_without_a_network_the_report_says_what_could_not_be_reached(retry, pauses, tmp_path):
    with Server({}) as gone:
        url = gone.url("a.bin")
    with pytest.raises(DownloadError, match=r"(?s)refused.*LLM_ASSETS=embedded"):
        fetch(asset(url), tmp_path, retry)
    assert pauses == [1, 2, 4]


def test_a_good_file_needs_no_network(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    assert fetch(asset("https://nowhere.invalid/a.bin"), tmp_path) == tmp_path / "a.bin"
    assert files(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("content", [DATA[:-1], bytes(len(DATA)), b"", b"<html>".ljust(len(DATA))])
def test_a_file_that_differs_is_reported_and_left_alone(content, server, retry, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DownloadError, match=r"a\.bin exists, but .* move it away or delete it"):
        fetch(asset(server.url("a.bin")), tmp_path, retry)
    assert (tmp_path / "a.bin").read_bytes() == content
    assert server.requests == []


# Killed, and eight processes at once


def test_after_a_killed_download_only_the_rest_is_transferred(server, retry, tmp_path):
    wanted = asset(server.url("a.bin", "slow"))
    child = in_child(f"fetch({wanted!r}, {str(tmp_path)!r})")
    partial = tmp_path / "a.bin.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size >= 3 * PIECE)
    child.kill()
    child.wait()
    arrived = partial.stat().st_size
    assert 3 * PIECE <= arrived < len(DATA) and not (tmp_path / "a.bin").exists()
    assert_fetched(fetch(wanted, tmp_path, retry))
    rest = server.requests[-1]
    assert (rest.range, rest.sent) == (f"bytes={arrived}-", len(DATA) - arrived)


def test_after_a_kill_before_the_renaming_nothing_is_transferred(server, retry, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(transfer.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(asset(server.url("a.bin")), tmp_path, retry)
    assert files(tmp_path) == ["a.bin.partial"]
    server.requests.clear()
    assert_fetched(fetch(asset(server.url("a.bin")), tmp_path, retry))
    assert server.requests == []


def test_eight_processes_at_once_transfer_one_good_file(server, tmp_path):
    wanted = asset(server.url("a.bin", "slow"))
    children = [in_child(f"print(fetch({wanted!r}, {str(tmp_path)!r}))") for _ in range(8)]
    assert [child.wait(180) for child in children] == [0] * 8
    assert_fetched(tmp_path / "a.bin")
    assert [request.sent for request in server.requests] == [len(DATA)]


# Files whose hash is not known in advance


def test_the_first_download_of_an_unpinned_file_is_recorded_and_enforced(server, retry, tmp_path):
    path = fetch(unpinned(server.url("a.bin")), tmp_path, retry)
    assert (tmp_path / "a.bin.sha256").read_text(encoding="utf-8") == f"{SHA256}  a.bin\n"
    path.unlink()
    with pytest.raises(DownloadError, match=r"SHA-256 [0-9a-f]{16}… instead of"):
        fetch(unpinned(server.url("a.bin", "wrong_bytes")), tmp_path, retry)
    path.write_bytes(bytes(len(DATA)))
    with pytest.raises(DownloadError, match=r"delete it \(and a\.bin\.sha256\)"):
        fetch(unpinned(server.url("a.bin")), tmp_path, retry)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "a.bin.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(DownloadError, match=r"delete it \(and a\.bin\.sha256\)"):
        fetch(unpinned("https://nowhere.invalid/a.bin"), tmp_path)


def test_an_unpinned_file_put_there_by_hand_is_recorded(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    fetch(unpinned("https://nowhere.invalid/a.bin"), tmp_path)
    assert (tmp_path / "a.bin.sha256").read_text(encoding="utf-8").startswith(SHA256)


def test_an_unpinned_file_of_another_size_is_refused(server, retry, tmp_path):
    with pytest.raises(DownloadError, match="offers 667,705 bytes instead of 99"):
        fetch(unpinned(server.url("a.bin"), size=99), tmp_path, retry)


def test_an_empty_file_is_refused(server, retry, tmp_path):
    with pytest.raises(DownloadError, match="an empty file"):
        fetch(unpinned(server.url("a.bin", "status=200")), tmp_path, retry)
    assert files(tmp_path) == []


def test_an_unpinned_file_is_resumed_by_its_etag(server, retry, tmp_path):
    assert fetch(unpinned(server.url("a.bin", "drops")), tmp_path, retry).read_bytes() == DATA
    assert files(tmp_path) == ["a.bin", "a.bin.sha256"]
    assert sum(request.sent for request in server.requests) == len(DATA)


@pytest.mark.parametrize("fault", ["changes", "drops_weak"])
def test_an_unpinned_file_that_may_have_changed_starts_over(fault, server, retry, tmp_path):
    assert fetch(unpinned(server.url("a.bin", fault)), tmp_path, retry).read_bytes() == DATA
    assert server.requests[-1].sent == len(DATA)


def test_an_unpinned_file_of_another_source_starts_over(server, hasty_retry, tmp_path):
    sources = server.url("a.bin", "hangs"), server.url("a.bin")
    assert fetch(unpinned(*sources), tmp_path, hasty_retry).read_bytes() == DATA
    assert server.requests[-1].range is None


@pytest.mark.parametrize(
    "fault, says", [("no_length", "states no length"), ("chunked_cut", "IncompleteRead|Incomplete")]
)
def test_an_unpinned_file_that_might_be_short_is_refused(fault, says, server, retry, tmp_path):
    with pytest.raises(DownloadError, match=says):
        fetch(unpinned(server.url("a.bin", fault)), tmp_path, retry)
    assert not (tmp_path / "a.bin").exists()


# The disk


def test_a_full_disk_is_noticed_before_the_transfer(server, retry, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"667,705 more bytes do not fit.*LLM_CACHE_DIR"):
        fetch(asset(server.url("a.bin"), server.url("a.bin", "redirect")), tmp_path, retry)
    assert files(tmp_path) == [] and len(server.requests) == 1


def test_a_disk_that_fills_up_loses_nothing(server, retry, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(transfer, "open", FullDisk, raising=False)
        with pytest.raises(DownloadError, match=r"No space left.*next run resumes"):
            fetch(asset(server.url("a.bin")), tmp_path, retry)
    assert files(tmp_path) == ["a.bin.partial"]
    assert_fetched(fetch(asset(server.url("a.bin")), tmp_path, retry))
    assert server.requests[-1].range == f"bytes={FullDisk.room}-"


class FullDisk(io.FileIO):
    room = 200_000

    def write(self, data):
        left = self.room - self.tell()
        super().write(data[:left])
        if len(data) > left:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_made_is_reported(server, retry, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(DownloadError, match=r"could not be written.*choose another folder"):
        fetch(asset(server.url("a.bin")), tmp_path / "file" / "folder", retry)
    assert server.requests == []


def test_a_read_only_folder_is_reported(server, retry, tmp_path, monkeypatch):
    read_only(tmp_path, monkeypatch)
    with pytest.raises(DownloadError, match=r"could not be written.*(denied|Read-only).*LLM_CACHE_DIR"):
        fetch(asset(server.url("a.bin")), tmp_path, retry)
    assert server.requests == []


@pytest.mark.parametrize("make", [asset, unpinned])
def test_a_good_file_in_a_read_only_folder_is_used(make, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(DATA)
    read_only(tmp_path, monkeypatch)
    assert fetch(make("https://nowhere.invalid/a.bin"), tmp_path).read_bytes() == DATA


def read_only(folder, monkeypatch):
    """Forbid writing. The administrator and Windows ignore the file mode, so there the error is simulated."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    if os.name == "nt" or os.geteuid() == 0:
        monkeypatch.setattr(downloads, "FileLock", refuse)
        monkeypatch.setattr(downloads, "write_record", refuse)
    else:
        folder.chmod(0o500)


def test_500_megabytes_are_downloaded_with_little_memory(server, tmp_path):
    big = Asset("big", "zeros.bin", (server.url("zeros.bin"),), len(ZEROS), ZEROS_SHA256, "none")
    child = in_child(f"fetch({big!r}, {str(tmp_path)!r}); print(peak() - before)", stdout=subprocess.PIPE)
    more = int(child.communicate(timeout=300)[0])
    size = (tmp_path / "zeros.bin").stat().st_size
    (tmp_path / "zeros.bin").unlink()
    assert size == len(ZEROS)
    assert 0 < more < 200_000_000


def interrupt(*_):
    raise KeyboardInterrupt
