"""The downloader for everything that the book's code fetches: resumable, verified, all or nothing.

    path = fetch(ASSETS["gpt2/124M/vocab.bpe"], "gpt2/124M")

A file gets its final name only when it is complete and verified. Until then it grows in NAME.partial, from
which the next run resumes. `DOWNLOADS.md` lists every fault and its outcome.
"""

import os
import re
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock
from pooch import file_hash

from book_assets import in_cache
from book_assets.archives import LARGEST, ArchiveError, copy_member, member_hash
from book_assets.files import replacing
from book_assets.table import ASSETS
from book_assets.transfer import LOGIN_PAGE, RETRY, Rejected, Transfer

SPAM_SHA256 = ASSETS["sms-spam"].member.sha256


class DownloadError(OSError):
    """A file could not be downloaded. The message says why, for each source, and what the reader can do."""


def fetch(asset, folder, retry=RETRY):
    """Return the path of `asset` in `folder`, downloaded and verified unless a good file is there.

    A file with the right hash is used without any network access. Raises DownloadError if a different file
    has that name (it is never overwritten), if no source provides the file, or if `folder` is not writable.
    """
    path = Path(folder) / asset.filename
    with os_errors_explained(path):
        if is_good(asset, path):
            return path
        with file_lock(path):
            if not is_good(asset, path):  # another process may have been faster
                download(asset, path, retry)
    return path


def fetch_spam_data(
    url, zip_path, extracted_path, data_file_path, member_sha256=SPAM_SHA256, asset=ASSETS["sms-spam"],
    retry=RETRY,
):
    """Return `data_file_path`, with the SMS Spam Collection in it; the archive is kept at `zip_path`.

    Only `url` is tried; None means the sources of `asset`. In any archive, the member must have the SHA-256
    `member_sha256`, unless that is None. A relative `zip_path` is put into the folder of downloads, see
    `in_cache`. Raises DownloadError, also if there is a different file at one of the two paths.
    """
    zip_path = in_cache(zip_path)
    target = Path(data_file_path)
    size = asset.member.size if member_sha256 == asset.member.sha256 else None
    member = replace(asset.member, size=size, sha256=member_sha256)
    sources = asset.sources if url is None else (url,)
    asset = replace(asset, filename=zip_path.name, sources=sources, member=member)
    with os_errors_explained(target):
        if target_is_good(target, member_sha256):
            return target
        archive = fetch(asset, zip_path.parent, retry)
        Path(extracted_path).mkdir(parents=True, exist_ok=True)
        with file_lock(target):
            if not target_is_good(target, member_sha256):
                extract(archive, member, target)
    return target


def extract(archive, member, target):
    """Write the member to `target`, complete and verified or not at all."""
    try:
        with replacing(target) as partial:
            copy_member(archive, member, partial)
    except ArchiveError as error:
        raise file_conflict(archive, str(error)) from error


def target_is_good(target, sha256):
    """Return whether the extracted file exists; raise DownloadError if it is a different one."""
    if not target.exists():
        return False
    if sha256 not in (None, file_hash(target)):
        raise file_conflict(target, "it is not the SMS Spam Collection (its SHA-256 differs)")
    return True


# Files on disk


def record_path(path):
    """Return the path that records the SHA-256 of an unpinned asset's first download (sha256sum's format)."""
    return Path(f"{path}.sha256")


def expected_hash(asset, path):
    """Return the SHA-256 that the file at `path` must have, or None if it is not known yet."""
    record = record_path(path)
    if asset.sha256 or not record.exists():
        return asset.sha256
    return next(iter(record.read_text(encoding="utf-8", errors="replace").split()), None)


def write_record(path, sha256):
    with replacing(record_path(path)) as partial:
        partial.write_text(f"{sha256}  {path.name}\n", encoding="utf-8", newline="\n")


def find_fault(asset, file, expected):
    """Return what is wrong with a complete file, or None."""
    size = file.stat().st_size
    if size == 0:
        return "an empty file"
    with open(file, "rb") as start:
        if re.match(rb"\s*<(!doctype html|html)", start.read(200), re.IGNORECASE):
            return LOGIN_PAGE
    if asset.member:
        return find_archive_fault(asset.member, file)
    if asset.size not in (None, size):
        return f"{size:,} bytes instead of {asset.size:,}"
    found = file_hash(file)
    if expected not in (None, found):
        return f"SHA-256 {found[:16]}… instead of {expected[:16]}…"
    return None


def find_archive_fault(member, file):
    try:
        found = member_hash(file, member)
    except ArchiveError as error:
        return str(error)
    if member.sha256 not in (None, found):
        return f"its member {member.name} has SHA-256 {found[:16]}… instead of {member.sha256[:16]}…"
    return None


def is_good(asset, path):
    """Return whether the complete file exists; raise DownloadError if a different one has its name.

    An unpinned file that was put there by hand is trusted, and its hash recorded.
    """
    if not path.exists():
        return False
    expected = expected_hash(asset, path)
    if reason := find_fault(asset, path, expected):
        raise file_conflict(path, reason)
    if expected is None and asset.member is None:
        with suppress(OSError):  # a read-only folder
            write_record(path, file_hash(path))
    return True


def file_conflict(path, reason):
    return DownloadError(
        f"{path.absolute()} exists, but {reason}. It was not changed: move it away or delete it"
        f"{' (and ' + record_path(path).name + ')' if record_path(path).exists() else ''}, then try again."
    )


@contextmanager
def os_errors_explained(path):
    """Raise a DownloadError that says what to do in place of another OSError."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{path.absolute()} could not be written: {error}. Free some space, or choose another folder, "
            "for example with the environment variable LLM_CACHE_DIR. The bytes received are kept, and the "
            "next run resumes there."
        ) from error


@contextmanager
def file_lock(path):
    """Let one process at a time work on `path`; create its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield
        with suppress(OSError):  # after success only: a waiting process then finds the finished file
            os.unlink(f"{path}.lock")


# From the sources


def download(asset, path, retry):
    """Download the file from the first source that provides it; raise DownloadError if none does."""
    expected = expected_hash(asset, path)
    size, limit = (None, LARGEST) if asset.member else (asset.size, asset.size)
    checkable = expected is not None and not asset.member
    transfer = Transfer(path, size, limit, checkable, retry)
    failures = []
    for url in asset.sources:
        try:
            complete(asset, transfer, url, expected)
            break
        except Rejected as reason:
            failures.append(f"  {url}\n    {reason}")
    else:
        raise DownloadError(report(asset, path, failures, transfer.bytes_received()))
    if expected is None and not asset.member:
        write_record(path, file_hash(transfer.partial))
    transfer.rename()


def complete(asset, transfer, url, expected):
    """Receive and verify the partial file from one source, or raise Rejected."""
    inherited = transfer.bytes_received() > 0
    transfer.receive(url)
    reason = find_fault(asset, transfer.partial, expected)
    if reason and inherited:  # the bad bytes may be from an earlier run or another source
        transfer.discard()
        transfer.receive(url)
        reason = find_fault(asset, transfer.partial, expected)
    if reason:
        transfer.discard()
        raise Rejected(reason)


def report(asset, path, failures, received):
    """Return the error message: what happened at each source, and what the reader can do."""
    size = f"{asset.size:,} bytes" if asset.size else "size unknown"
    kept = f"\nThe {received:,} bytes received are kept, and the next run resumes there." if received else ""
    return (
        f"{asset.name} could not be downloaded:\n" + "\n".join(failures) + "\n"
        "What you can do:\n"
        "- Work without it: set the environment variable LLM_ASSETS=embedded (scripts: --assets embedded) "
        "to use\n  the model and the texts in this repository.\n"
        f"- Download it yourself and save it as {path.absolute()}\n"
        f"  ({size}, SHA-256 {asset.sha256 or 'unknown'}).\n"
        "- Behind a proxy, set HTTPS_PROXY; behind a company's certificate, set REQUESTS_CA_BUNDLE to the "
        f"certificate file.{kept}"
    )
