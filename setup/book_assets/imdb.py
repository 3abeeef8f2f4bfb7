"""The Large Movie Review Dataset (IMDb): from its archive of 100,000 files to two files of one review a line.

A line of `imdb/train.tsv.gz` or `imdb/test.tsv.gz` is the name of the review's file, such as pos/17_9 (label,
number, stars), a tab, and the text, with `<br />` as it is and a blank for each tab or line end.
"""

import gzip
import re
import tarfile
import zlib
from contextlib import ExitStack
from pathlib import PurePosixPath

from book_assets import in_cache
from book_assets.archives import ArchiveError, leads_outside
from book_assets.downloads import fetch, file_conflict, file_lock, os_errors_explained
from book_assets.files import replacing
from book_assets.table import ASSETS
from book_assets.transfer import RETRY

PER_CLASS = 12_500  # positive reviews in each part, and as many negative ones
REVIEW = re.compile(r"aclImdb/(train|test)/((neg|pos)/(\d+)_\d+)\.txt")


def fetch_reviews(asset=ASSETS["imdb"], per_class=PER_CLASS, retry=RETRY):
    """Return {"train", "test": path} of the two files of reviews in the folder of downloads.

    If one is missing, the archive is downloaded, unless it is there, and both are written; the archive is
    kept. Raises DownloadError as `fetch` does, and for an archive with a member outside aclImdb/, a link, or
    another number than `per_class` of positive or negative reviews in a part.
    """
    paths = {part: in_cache(f"imdb/{part}.tsv.gz") for part in ("train", "test")}
    with os_errors_explained(paths["train"]):
        if not all_there(paths):
            archive = fetch(asset, in_cache(asset.folder), retry)
            with file_lock(paths["train"]):
                if not all_there(paths):  # another process may have been faster
                    convert_archive(archive, paths, per_class)
    return paths


def all_there(paths):
    return all(path.exists() for path in paths.values())


def convert_archive(archive, paths, per_class):
    """Write the reviews in `archive` to `paths`, {part: path}: both files complete, or none."""
    try:
        reviews = read_archive(archive)
        check_complete(reviews, paths, per_class)
    except ArchiveError as error:
        raise file_conflict(archive, str(error)) from error
    with ExitStack() as stack:
        for part, path in paths.items():
            partial = stack.enter_context(replacing(path))
            lines = [line for key, line in sorted(reviews.items()) if key[0] == part]
            partial.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def read_archive(archive):
    """Return {(part, label, number): line} of all labelled reviews in the file `archive`.

    Nothing is unpacked. Raises ArchiveError if it is damaged, or has a link or a member outside aclImdb/.
    """
    reviews = {}
    try:
        with tarfile.open(archive, "r|gz") as opened:
            for info in opened:
                check_entry(info)
                if (match := REVIEW.fullmatch(info.name)) and info.isfile():
                    part, name, label, number = match.groups()
                    text = re.sub(r"[\t\r\n]", " ", opened.extractfile(info).read().decode("utf-8"))
                    reviews[part, label, int(number)] = f"{name}\t{text}\n"
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ArchiveError(f"a damaged tar archive ({error})") from error
    return reviews


def check_entry(info):
    """Raise ArchiveError for a member outside aclImdb/ and for one that is neither a file nor a folder."""
    if leads_outside(info.name) or PurePosixPath(info.name).parts[:1] != ("aclImdb",):
        raise ArchiveError(f"an archive with the member {info.name!r}, which is outside aclImdb/")
    if not (info.isfile() or info.isdir()):
        raise ArchiveError(f"an archive whose member {info.name!r} is a link or a device")


def check_complete(reviews, parts, per_class):
    for part in parts:
        for label in ("neg", "pos"):
            count = sum(key[:2] == (part, label) for key in reviews)
            if count != per_class:
                raise ArchiveError(f"an archive with {count:,} reviews in {part}/{label}, not {per_class:,}")
