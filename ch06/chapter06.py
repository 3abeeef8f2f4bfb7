"""The printed listings' other spelling of `ch06`: both names are the same module."""

import sys

import ch06

sys.modules[__name__] = ch06
