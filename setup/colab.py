"""Prepare Colab: install what it lacks, put the chapters on the import path, go to a notebook's folder.

Every notebook's first cell runs this there, after it has cloned the repository:

    %run book/setup/colab.py ch04

Colab keeps its own versions of PyTorch and Jupyter. No restart is needed.
"""

import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

SETUP = Path(__file__).resolve().parent
COLABS_OWN = ("torch", "jupyter", "-", "#")


def packages():
    """Return the requirements of the notebooks, but for those that Colab brings in versions of its own."""
    files = SETUP / "requirements-main.txt", SETUP / "requirements-notebooks.txt"
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith(COLABS_OWN)]


def pip_install(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *arguments], check=True)


def main(folder):
    pip_install(*packages())
    pip_install("--no-deps", "--require-hashes", "-r", str(SETUP / "requirements-no-deps.txt"))
    pip_install("--no-deps", "-e", str(SETUP.parent))
    # Nothing counts as known: %run takes this file's folder off sys.path again when it ends.
    site.addsitedir(sysconfig.get_paths()["purelib"], known_paths=set())
    os.chdir(SETUP.parent / folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
