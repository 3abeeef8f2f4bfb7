"""Create the repository's virtual environment, `.venv`, and run a script in it.

`run_main.py`, `run_tests.py` and `run_notebooks.py` use it. It needs only the standard library. Running it
again is quick: nothing is installed twice.
"""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
VENV = REPOSITORY / ".venv"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MAIN = REPOSITORY / "setup" / "requirements-main.txt"
ALL = REPOSITORY / "requirements.txt"


def venv_python():
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check_platform():
    """Raise SystemExit with a remedy if the requirements cannot be installed on this platform."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise SystemExit(
            f"Python {platform.python_version()} is not supported: PyTorch and TensorFlow need 3.10 to 3.13. "
            "Install one of these versions (python.org) and run this script with it."
        )
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise SystemExit(
            "PyTorch has no current version for Intel Macs: use Colab, as setup/README.md describes. "
            "If this Mac has Apple silicon, this Python is an Intel build: install the arm64 build."
        )


def can_reach(host):
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


def torch_requirement():
    lines = MAIN.read_text(encoding="utf-8").splitlines()
    return next(line.split(";")[0].strip() for line in lines if line.startswith("torch=="))


def pip(*arguments):
    command = [str(venv_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    print("  pip install", *arguments, flush=True)
    if subprocess.run([*command, *arguments], cwd=REPOSITORY).returncode:
        raise SystemExit(
            "pip could not install these packages; its message is above. Check the network connection "
            "(behind a proxy, set HTTPS_PROXY), then run the same command again."
        )


def create_venv():
    if venv_python().exists():
        return
    print(f"Creating the environment {VENV}", flush=True)
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SystemExit(
            f"Python could not create an environment ({error}). On Debian and Ubuntu: "
            "sudo apt install python3-venv, then run the same command again."
        ) from None


def install(requirements):
    """Install `requirements` and the repository into `.venv`, unless that has already been done."""
    stamp = VENV / f"installed-{requirements.stem}.txt"
    wanted = hashlib.sha256(
        MAIN.read_bytes() + requirements.read_bytes() + (REPOSITORY / "pyproject.toml").read_bytes()
    ).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing {requirements.relative_to(REPOSITORY).as_posix()} (once, a few minutes)", flush=True)
    if sys.platform == "linux" and not shutil.which("nvidia-smi") and can_reach("download.pytorch.org"):
        pip("--index-url", TORCH_CPU_INDEX, torch_requirement())  # no GPU: avoid the CUDA build of several GB
    pip("-r", str(requirements.relative_to(REPOSITORY)))
    stamp.write_text(wanted)


def run(requirements, *command):
    """Set up `.venv`, run `command` with its Python in the repository's root, and return the exit code."""
    check_platform()
    create_venv()
    install(requirements)
    print("Running python", *command, flush=True)
    return subprocess.run([str(venv_python()), *command], cwd=REPOSITORY).returncode
