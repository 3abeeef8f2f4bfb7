"""Set everything up, then open the notebooks in JupyterLab. Arguments are JupyterLab's.

    python setup/run_notebooks.py
"""

import sys

import environment

if __name__ == "__main__":
    sys.exit(environment.run(environment.ALL, "-m", "jupyter", "lab", *sys.argv[1:]))
