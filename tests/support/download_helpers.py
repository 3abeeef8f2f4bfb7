"""What the tests of downloads share: a file, its table entry, the server, and short patience."""

import hashlib
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import book_assets
from book_assets.table import Asset
from book_assets.transfer import Patience
from misbehaving_server import PIECE, Server, Zeros

DATA = random.Random(123).randbytes(10 * PIECE + 12_345)
SHA256 = hashlib.sha256(DATA).hexdigest()
ZEROS = Zeros(500_000_000)
ZEROS_SHA256 = "38f7c0648553d81ad9402ebdd1b275a0029644c5b7eef7c963dfa7db9ef0ba23"
SETUP = Path(book_assets.__file__).parent.parent


@pytest.fixture(scope="module")
def running_server():
    with Server({"a.bin": DATA, "zeros.bin": ZEROS}) as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.requests.clear()
    return running_server


@pytest.fixture
def naps():
    return []


@pytest.fixture
def patience(naps):
    """The usual patience, but pauses take no time: they are noted in `naps`."""
    return Patience(sleep=naps.append)


@pytest.fixture
def haste(patience):
    """The same for servers that hang or trickle."""
    return replace(patience, read=0.3, window=0.2)


def asset(*sources, **changes):
    """DATA as an asset with these sources."""
    return replace(Asset("test/a.bin", "a.bin", sources, len(DATA), SHA256, "none"), **changes)


def unpinned(*sources, **changes):
    return asset(*sources, **{"size": None, "sha256": None, **changes})


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def assert_fetched(path):
    """The file is whole, and nothing else is left beside it."""
    assert path.read_bytes() == DATA
    assert sorted(path.parent.iterdir()) == [path]


CHILD = """
import sys
from pathlib import Path
def peak():
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory before exec, too
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
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
