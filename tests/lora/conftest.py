"""The folder that the property tests of adapters share."""

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder for property tests, whose examples all write to it."""
    return tmp_path_factory.mktemp("adapters")
