"""Helpers for the tests of downloads: a file and its table entry, and child processes."""

import hashlib
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import book_assets
from book_assets.table import Asset
from misbehaving_server import PIECE, Zeros

DATA = random.Random(123).randbytes(10 * PIECE + 12_345)
SHA256 = hashlib.sha256(DATA).hexdigest()
ZEROS = Zeros(500_000_000)
ZEROS_SHA256 = "38f7c0648553d81ad9402ebdd1b275a0029644c5b7eef7c963dfa7db9ef0ba23"
SETUP = Path(book_assets.__file__).parent.parent


def asset(*sources, **changes):
    """Return DATA as an asset with these sources."""
    return replace(Asset("test/a.bin", "a.bin", sources, len(DATA), SHA256, "none"), **changes)


def unpinned(*sources, **changes):
    return asset(*sources, **{"size": None, "sha256": None, **changes})


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def assert_fetched(path):
    """Assert that the file is complete and alone in its folder."""
    assert path.read_bytes() == DATA
    assert sorted(path.parent.iterdir()) == [path]


CHILD = """
import sys
from pathlib import Path
def peak():
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the parent's memory before exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
sys.path.insert(0, {setup!r})
from book_assets.table import Asset
from book_assets.downloads import fetch
{code}
"""


def in_child(code, **options):
    program = CHILD.format(setup=str(SETUP), code=code)
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, **options)


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.01)
