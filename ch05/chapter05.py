"""The printed listings' other spelling of `ch05`: both names are the same module."""

import sys

import ch05

sys.modules[__name__] = ch05
