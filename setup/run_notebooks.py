"""Create the environment, then open the repository in JupyterLab. Arguments go to JupyterLab.

    python setup/run_notebooks.py
"""

import sys

from book_assets.command_line import command
from make_environment import NOTEBOOKS, REPOSITORY, run


@command
def main(_):
    run(NOTEBOOKS, "-m", "jupyter", "lab", *sys.argv[1:], folder=REPOSITORY)


if __name__ == "__main__":
    main()
