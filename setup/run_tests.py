"""The README's second command: set everything up, then run the tests.

    python setup/run_tests.py                  # everything but what is marked slow
    python setup/run_tests.py --slow           # everything
    python setup/run_tests.py tests/test_ch04.py -k cache    # arguments are pytest's
"""

import sys

import make_environment

if __name__ == "__main__":
    sys.exit(make_environment.run(make_environment.ALL, "-m", "pytest", *sys.argv[1:]))
