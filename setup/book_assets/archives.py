"""Extract one member of an untrusted zip archive."""

import hashlib
import zipfile
import zlib
from pathlib import PurePosixPath

CHUNK = 1 << 16
LARGEST = 100_000_000  # bytes: the limit for an archive or member of unknown size


class ArchiveError(ValueError):
    """The archive is damaged, or not the expected one."""


def member_hash(archive, member):
    """Return the SHA-256 of `member` in the zip file `archive`. Raises ArchiveError."""
    digest = hashlib.sha256()
    for chunk in read_member(archive, member):
        digest.update(chunk)
    return digest.hexdigest()


def copy_member(archive, member, target):
    """Write `member`, and nothing else, to the file `target`.

    Raises ArchiveError unless it has the size and SHA-256 of `member` (None: any). `target` then contains
    unverified data: pass a temporary path, as `replacing` gives.
    """
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        for chunk in read_member(archive, member):
            digest.update(chunk)
            file.write(chunk)
    if member.sha256 not in (None, digest.hexdigest()):
        raise ArchiveError(f"{member.name} is not the expected file: its SHA-256 differs")


def read_member(archive, member):
    """Yield the member's bytes in chunks, after checking the archive's directory."""
    try:
        with zipfile.ZipFile(archive) as opened:
            info = inspect_members(opened, member)
            with opened.open(info) as stream:
                while chunk := stream.read(CHUNK):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ArchiveError(f"a damaged zip archive ({error})") from error


def inspect_members(opened, member):
    """Return the member's entry; raise ArchiveError if it is missing, too large or compressed oddly, or a
    name leads outside.
    """
    for name in opened.namelist():
        if leads_outside(name):
            raise ArchiveError(f"an archive with the member {name!r}, which leads out of its folder")
    entries = [info for info in opened.infolist() if info.filename == member.name]
    if len(entries) != 1:
        raise ArchiveError(f"an archive with {len(entries)} members called {member.name}")
    if entries[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError(f"an archive that compresses {member.name} in an unusual way")
    size = entries[0].file_size
    if size > LARGEST or member.size not in (None, size):
        raise ArchiveError(f"an archive whose {member.name} has {size:,} bytes")
    return entries[0]


def leads_outside(name):
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in name
