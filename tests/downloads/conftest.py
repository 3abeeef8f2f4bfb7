"""Fixtures of the tests of downloads: the misbehaving server, and retry policies that do not wait."""

from dataclasses import replace

import pytest

from book_assets.transfer import RetryPolicy
from download_helpers import DATA, ZEROS
from misbehaving_server import Server


@pytest.fixture(scope="module")
def running_server():
    with Server({"a.bin": DATA, "zeros.bin": ZEROS}) as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.requests.clear()
    return running_server


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def retry(pauses):
    """The default policy, except that pauses are recorded in `pauses` and take no time."""
    return RetryPolicy(sleep=pauses.append)


@pytest.fixture
def hasty_retry(retry):
    """The same, for servers that hang or trickle."""
    return replace(retry, read=0.3, window=0.2)
