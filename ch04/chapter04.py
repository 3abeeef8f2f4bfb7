"""The printed listings' other spelling of `ch04`: both names are the same module."""

import sys

import ch04

sys.modules[__name__] = ch04
