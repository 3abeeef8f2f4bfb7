"""The README's second command: create the environment, then run the tests. Arguments go to pytest.

    python setup/run_tests.py                  # all tests except the slow ones
    python setup/run_tests.py --slow           # all tests
    python setup/run_tests.py tests/chapters/test_ch04.py -k cache
"""

import sys

import make_environment

if __name__ == "__main__":
    sys.exit(make_environment.run(make_environment.ALL, "-m", "pytest", *sys.argv[1:]))
