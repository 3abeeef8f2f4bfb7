"""Fixtures that start commands as processes: what they print, how they end, what they leave."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from book_assets.table import REPOSITORY


@dataclass
class Ended:
    """How a process ended: its exit code, and both outputs read as UTF-8."""

    code: int
    out: str
    err: str


@pytest.fixture
def start(tmp_path):
    """Return a function that starts Python in the temporary folder, with the repository on the path."""
    paths = [str(REPOSITORY / name) for name in ("ch04", "ch05", "ch06", "appendix-E", "setup")]

    def start(*command, path=(), cwd=tmp_path, python=sys.executable, **variables):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *paths])}
        environment |= {"LLM_ASSETS": "", "NOTEBOOK_QUICK": ""} | variables
        return subprocess.Popen(
            [python, *command], cwd=cwd, env=environment, start_new_session=os.name != "nt",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture
def run(start):
    """Return a function that runs Python to its end and returns how it `Ended`."""

    def run(*command, stdin=b"", **options):
        process = start(*command, **options)
        out, err = process.communicate(stdin, timeout=120)
        return Ended(process.returncode, out.decode("utf-8"), err.decode("utf-8"))

    return run


@pytest.fixture
def shell(tmp_path):
    """Return a function that runs a line of the shell, in which $PYTHON is the interpreter."""

    def shell(line):
        environment = os.environ | {"PYTHON": sys.executable}
        result = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"], cwd=tmp_path, env=environment, capture_output=True,
            timeout=120,
        )
        return Ended(result.returncode, result.stdout.decode("utf-8"), result.stderr.decode("utf-8"))

    return shell


@pytest.fixture
def interrupt():
    """Return a function that presses Ctrl-C as soon as the process prints a line, and waits for its end."""

    def interrupt(process):
        first = process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        return Ended(process.returncode, (first + out).decode("utf-8"), err.decode("utf-8"))

    return interrupt
