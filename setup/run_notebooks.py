"""Create the environment, then open the notebooks in JupyterLab. Arguments go to JupyterLab.

    python setup/run_notebooks.py
"""

import sys

import make_environment

if __name__ == "__main__":
    sys.exit(make_environment.run(make_environment.ALL, "-m", "jupyter", "lab", *sys.argv[1:]))
