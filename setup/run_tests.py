"""The tests: create the environment, then run the tests. Arguments go to pytest.

    python setup/run_tests.py                  # all tests except the slow ones
    python setup/run_tests.py --slow           # all tests
    python setup/run_tests.py tests/chapters/test_ch04.py -k cache

It runs in the repository's root: paths in its arguments start there.
"""

import sys

from book_assets.command_line import command
from make_environment import ALL, REPOSITORY, run


@command
def main(_):
    run(ALL, "-m", "pytest", *sys.argv[1:], folder=REPOSITORY)


if __name__ == "__main__":
    main()
