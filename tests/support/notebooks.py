"""What the tests of notebooks share."""

import pytest

NOTEBOOK_LINES = pytest.StashKey[list]()
