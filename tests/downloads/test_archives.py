"""A member is extracted complete and verified, and nothing else is written anywhere."""

import hashlib
import io
import random
import zipfile
from dataclasses import replace

import pytest

from book_assets import archives, downloads
from book_assets.downloads import DownloadError, fetch_spam_data
from book_assets.table import ASSETS, Member
from download_helpers import files
from misbehaving_server import Server

NUMBERS = random.Random(1).sample(range(10**6), 5000)
MESSAGES = "".join(f"ham\tmessage {number}\n" for number in NUMBERS).encode()
MEMBER = Member("SMSSpamCollection", len(MESSAGES), hashlib.sha256(MESSAGES).hexdigest())


def make_zip(*members, method=zipfile.ZIP_DEFLATED):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", method) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return archive.getvalue()


GOOD = make_zip(("SMSSpamCollection", MESSAGES), ("readme", "about"))
BOMB = make_zip(("SMSSpamCollection", bytes(20 * len(MESSAGES))))
SIZE_OF_BOMB = (20 * len(MESSAGES)).to_bytes(4, "little")
ARCHIVES = {
    "good.zip": GOOD,
    "mirror.zip": make_zip(("readme", "other"), ("SMSSpamCollection", MESSAGES), method=zipfile.ZIP_STORED),
    "outside.zip": make_zip(("SMSSpamCollection", MESSAGES), ("../escaped", "x")),
    "absolute.zip": make_zip(("SMSSpamCollection", MESSAGES), ("/tmp/escaped", "x")),
    "windows.zip": make_zip(("SMSSpamCollection", MESSAGES), ("..\\escaped", "x")),
    "truncated.zip": GOOD[: len(GOOD) // 2],
    "damaged.zip": GOOD[:1000] + b"damage" + GOOD[1006:],
    "bomb.zip": BOMB,
    "lying_bomb.zip": BOMB.replace(SIZE_OF_BOMB, len(MESSAGES).to_bytes(4, "little")),
    "other.zip": make_zip(("SMSSpamCollection", MESSAGES[::-1])),
    "without.zip": make_zip(("readme", "about")),
    "bzip2.zip": make_zip(("SMSSpamCollection", MESSAGES), method=zipfile.ZIP_BZIP2),
    "lzma.zip": make_zip(("SMSSpamCollection", MESSAGES), method=zipfile.ZIP_LZMA),
}
REFUSED = {
    "outside.zip": r"'\.\./escaped', which leads out",
    "absolute.zip": r"'/tmp/escaped', which leads out",
    "windows.zip": r"escaped', which leads out",
    "truncated.zip": "damaged zip archive",
    "damaged.zip": "damaged zip archive",
    "bomb.zip": f"has {20 * len(MESSAGES):,} bytes",
    "lying_bomb.zip": "damaged zip archive",
    "other.zip": "SMSSpamCollection has SHA-256",
    "without.zip": "0 members called SMSSpamCollection",
    "bzip2.zip": "compresses SMSSpamCollection in an unusual way",  # their streams fail in ways of their own
    "lzma.zip": "compresses SMSSpamCollection in an unusual way",
}


@pytest.fixture(scope="module")
def server():
    with Server(ARCHIVES) as running:
        yield running


@pytest.fixture
def get(server, retry, tmp_path):
    """Return `fetch_spam_data` as listing E.1 calls it, with the sources of the test."""
    server.requests.clear()

    def call(*names, url=None, sha256=MEMBER.sha256):
        sources = tuple(server.url(name) for name in names)
        table = replace(ASSETS["sms-spam"], sources=sources, size=len(GOOD), member=MEMBER)
        folder = tmp_path / "sms_spam_collection"
        return fetch_spam_data(
            url and server.url(url), tmp_path / "sms_spam_collection.zip", folder,
            folder / "SMSSpamCollection.tsv", member_sha256=sha256, asset=table, retry=retry,
        )

    return call


def assert_extracted(target):
    assert target.read_bytes() == MESSAGES
    assert sorted(target.parent.iterdir()) == [target]
    assert files(target.parent.parent) == ["sms_spam_collection", "sms_spam_collection.zip"]


@pytest.mark.parametrize("name", ["good.zip", "mirror.zip"])
def test_any_archive_with_the_right_member_is_used(name, get):
    assert_extracted(get(name))


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_archive_is_refused_and_leaves_nothing(name, get, tmp_path):
    with pytest.raises(DownloadError, match=REFUSED[name]):
        get(name)
    assert files(tmp_path) == [] and not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_after_a_bad_archive_the_mirror_is_used(name, get):
    assert_extracted(get(name, "mirror.zip"))


def test_an_explicit_url_is_tried_alone(get, server):
    with pytest.raises(DownloadError, match="0 members"):
        get("good.zip", url="without.zip")
    assert [request.path for request in server.requests] == ["/good/without.zip"]


def test_another_member_is_accepted_only_if_the_caller_asks_for_it(get):
    assert get(url="other.zip", sha256=None).read_bytes() == MESSAGES[::-1]


def test_a_huge_member_is_refused_even_if_any_is_accepted(get, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 2 * len(MESSAGES))
    with pytest.raises(DownloadError, match="bytes"):
        get(url="bomb.zip", sha256=None)


def test_existing_files_need_no_network(get, server):
    get("good.zip")
    server.requests.clear()
    assert_extracted(get("without.zip"))
    assert server.requests == []


def test_an_archive_put_there_by_hand_needs_no_network(get, server, tmp_path):
    (tmp_path / "sms_spam_collection.zip").write_bytes(ARCHIVES["mirror.zip"])
    assert_extracted(get("without.zip"))
    assert server.requests == []


def test_an_existing_bad_archive_is_reported_and_left_alone(get, tmp_path):
    archive = tmp_path / "sms_spam_collection.zip"
    archive.write_bytes(ARCHIVES["truncated.zip"])
    with pytest.raises(DownloadError, match=r"collection\.zip exists, but a damaged zip.* move it away"):
        get("good.zip")
    assert archive.read_bytes() == ARCHIVES["truncated.zip"]


def test_a_data_file_that_differs_is_reported_and_left_alone(get, server):
    target = get("good.zip")
    target.write_bytes(b"ham\tmine\n")
    with pytest.raises(DownloadError, match=r"SMSSpamCollection\.tsv exists, but it is not the SMS Spam"):
        get("good.zip")
    assert target.read_bytes() == b"ham\tmine\n"


def test_an_interrupted_extraction_is_repeated(get, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "sms_spam_collection.zip").write_bytes(GOOD)
    with monkeypatch.context() as patched:
        patched.setattr(downloads.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get("without.zip")
    target = tmp_path / "sms_spam_collection" / "SMSSpamCollection.tsv"
    assert files(target.parent) == []
    assert_extracted(get("without.zip"))


def test_the_archive_goes_to_the_cache_and_the_data_file_does_not(server, retry, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fetch_spam_data(
        server.url("good.zip"), "s.zip", "s", "s/S.tsv", member_sha256=MEMBER.sha256, retry=retry,
        asset=replace(ASSETS["sms-spam"], member=MEMBER),
    )
    assert (tmp_path / "cache" / "s.zip").exists() and (tmp_path / "s" / "S.tsv").read_bytes() == MESSAGES


def test_the_default_pin_is_the_real_collection(book_data, retry, tmp_path):
    content = (book_data / "sms_spam_collection" / "SMSSpamCollection").read_bytes()
    with Server({"real.zip": make_zip(("SMSSpamCollection", content)), "other.zip": GOOD}) as server:
        paths = tmp_path / "s.zip", tmp_path / "s", tmp_path / "s" / "S.tsv"
        with pytest.raises(DownloadError, match=r"SMSSpamCollection has [\d,]+ bytes"):
            fetch_spam_data(server.url("other.zip"), *paths, retry=retry)
        assert fetch_spam_data(server.url("real.zip"), *paths, retry=retry).read_bytes() == content
