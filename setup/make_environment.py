"""Create the repository's virtual environment, `.venv`, and run a script in it.

`run_main.py`, `run_tests.py` and `run_notebooks.py` use it. It needs only the standard library. Running it
again is quick: nothing is installed twice. Its own lines go to standard error, so that standard output is
the script's alone.
"""

import hashlib
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
import venv
from contextlib import closing, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
VENV = REPOSITORY / ".venv"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MAIN = REPOSITORY / "setup" / "requirements-main.txt"
NOTEBOOKS = REPOSITORY / "setup" / "requirements-notebooks.txt"
ALL = REPOSITORY / "requirements.txt"
WITHOUT_DEPENDENCIES = REPOSITORY / "setup" / "requirements-no-deps.txt"


def venv_python():
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check_platform():
    """Raise OSError with a remedy if the requirements cannot be installed on this platform."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise OSError(
            f"Python {platform.python_version()} is not supported: PyTorch and TensorFlow need 3.10 to 3.13. "
            "Install one of these versions (python.org) and run this script with it."
        )
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise OSError(
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


def say(*words):
    print(*words, file=sys.stderr)


def call(*command, **options):
    """Run a command and return its exit code. Ctrl-C reaches the command too: it decides when to end."""
    interrupted = False
    with subprocess.Popen([str(word) for word in command], **options) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
    code = process.returncode
    if interrupted and code:
        raise KeyboardInterrupt
    if code < 0:
        say(f"error: stopped by signal {-code}; 9 may mean that the memory was not enough")
    return code if code >= 0 else 128 - code  # as a shell reports it


def pip(*arguments):
    say("  pip install", *arguments)
    command = [venv_python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if call(*command, cwd=REPOSITORY):
        raise OSError(
            "pip could not install these packages; its message is above. Check the network connection "
            "(behind a proxy, set HTTPS_PROXY) and the free disk space, then run the same command again."
        )


def venv_works():
    """Return whether `.venv` has a Python that starts and has pip; an interrupted creation leaves none."""
    with suppress(OSError):
        command = [str(venv_python()), "-c", "import pip"]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    return False


def create_venv():
    if venv_works():
        return
    say(f"Creating the environment {VENV}")
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(VENV, ignore_errors=True)
        raise OSError(
            f"Python could not create an environment ({error}). On Debian and Ubuntu: "
            "sudo apt install python3-venv, then run the same command again."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a file is there, or the path has a colon
        raise OSError(
            f"the environment cannot be created ({error}): move the repository to a folder that you "
            "can write to, with free space and no colon in its path, then run the same command again."
        ) from None


def stamp_and_content(requirements):
    """Return the file that says what has been installed, and its content when all of it has been."""
    files = MAIN, NOTEBOOKS, WITHOUT_DEPENDENCIES, requirements, REPOSITORY / "pyproject.toml"
    content = b"".join([os.fsencode(VENV), *(file.read_bytes() for file in files)])
    return VENV / f"installed-{requirements.stem}.txt", hashlib.sha256(content).hexdigest()


def is_installed(requirements):
    stamp, content = stamp_and_content(requirements)
    return stamp.exists() and stamp.read_text() == content and venv_works()


def install(requirements):
    """Install `requirements` and the repository into `.venv`."""
    say(f"Installing {requirements.relative_to(REPOSITORY).as_posix()} (once, a few minutes)")
    if sys.platform == "linux" and not shutil.which("nvidia-smi") and can_reach("download.pytorch.org"):
        pip("--index-url", TORCH_CPU_INDEX, torch_requirement())  # no GPU: avoid the CUDA build of several GB
    pip("-r", requirements.relative_to(REPOSITORY).as_posix())
    if requirements != MAIN:
        pip("--no-deps", "--require-hashes", "-r", WITHOUT_DEPENDENCIES.relative_to(REPOSITORY).as_posix())
    stamp, content = stamp_and_content(requirements)
    stamp.write_text(content)


def take_turn(connection):
    """Wait until no other process holds the lock; it ends with its process, even with a killed one."""
    while True:
        try:
            return connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            say("Waiting for another process that creates the environment")


def make_environment(requirements):
    """Create `.venv` and install `requirements`, unless that has been done, one process at a time."""
    if is_installed(requirements):
        return
    lock = f"{VENV}.lock"
    try:
        with closing(sqlite3.connect(lock, timeout=10, isolation_level=None)) as connection:
            take_turn(connection)
            if not is_installed(requirements):
                create_venv()
                install(requirements)
    except sqlite3.Error as error:
        raise OSError(
            f"{lock} cannot be written ({error}): move the repository to a folder that you can write "
            "to, with free space, then run the same command again."
        ) from None


def run(requirements, *command, folder=None):
    """Set up `.venv`, run `command` with its Python in `folder` (None: the current one), exit with its code.

    Raises OSError with a remedy if the set-up fails.
    """
    check_platform()
    make_environment(requirements)
    say("Running python", *command)
    sys.exit(call(venv_python(), *command, cwd=folder))
