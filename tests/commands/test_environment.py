"""The first command as a process: where it runs, with what, and what a failed installation leaves behind.

In these tests pip is a stand-in that writes down its arguments.
"""

import json
import os
import shutil
import subprocess
import venv

import pytest

from book_assets.table import REPOSITORY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs the signals and links of POSIX")
PIP = """
import os, sys, time
from pathlib import Path
if __name__ == "__main__":
    with open(Path(sys.prefix).parent / "pip.log", "a") as log:
        print(*sys.argv[1:], file=log)
    if os.environ.get("SLOW"):
        print("installing", flush=True)
        time.sleep(float(os.environ["SLOW"]))
    sys.exit(1 if os.environ.get("FAIL") else 0)
"""
SCRIPT = """
import json, os, signal, sys
print(json.dumps([os.getcwd(), sys.argv[1:], sys.prefix]))
code = int(os.environ.get("CODE", 0))
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def place(tmp_path):
    """A copy of the repository's set-up, in a folder with a difficult name, with an empty `.venv`."""
    root = tmp_path / "book [é] → #1"
    shutil.copytree(REPOSITORY / "setup", root / "setup", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(REPOSITORY / name, root)
    (root / "appendix-E").mkdir()
    (root / "appendix-E" / "finetune_spam.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("", encoding="utf-8")  # one installation, no network
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    venv.create(root / ".venv", symlinks=True)
    put_pip(root)
    return root


def put_pip(root):
    (packages,) = root.glob(".venv/lib/python*/site-packages")
    (packages / "pip.py").write_text(PIP, encoding="utf-8")


def log(root):
    path = root / "pip.log"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.fixture
def variables(place):
    return {"PATH": f"{place.parent / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


@pytest.fixture
def main_job(run, place, variables):
    def main_job(*arguments, **more):
        return run(place / "setup" / "run_main.py", *arguments, **variables | more)

    return main_job


def test_it_runs_in_the_readers_folder_with_the_environments_python(main_job, place, tmp_path):
    ended = main_job("--output-dir", "here", PYTHONIOENCODING="ascii")
    folder, arguments, prefix = json.loads(ended.out)
    assert (ended.code, folder, prefix) == (0, str(tmp_path), str(place / ".venv"))
    assert arguments == ["--assets", "embedded", "--output-dir", "here"]
    (installed,) = log(place)
    assert installed.endswith("-r setup/requirements-main.txt")


def test_the_variable_for_assets_replaces_the_default(main_job):
    for value, arguments in (("book", []), (" ", ["--assets", "embedded"])):
        assert json.loads(main_job(LLM_ASSETS=value).out)[1] == arguments


def test_only_a_moved_repository_is_installed_again(main_job, run, place, variables):
    main_job()
    main_job()
    assert len(log(place)) == 1
    moved = place.rename(place.with_name("moved"))
    assert run(moved / "setup" / "run_main.py", **variables).code == 0
    assert len(log(moved)) == 2


@pytest.mark.parametrize("code, seen", [(0, 0), (1, 1), (2, 2), (130, 130), (-9, 137), (-15, 143)])
def test_the_exit_code_is_the_scripts(code, seen, main_job):
    ended = main_job(CODE=str(code))
    assert ended.code == seen
    assert ("stopped by signal" in ended.err) == (code < 0) and "Traceback" not in ended.err


def test_a_failed_installation_is_one_line_and_is_tried_again(main_job, place):
    ended = main_job(FAIL="1")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.splitlines()[-1].startswith("error: pip could not install these packages")
    assert main_job().code == 0 and len(log(place)) == 2


def test_an_interrupted_installation_is_tried_again(main_job, start, interrupt, place, variables):
    ended = interrupt(start(place / "setup" / "run_main.py", SLOW="60", **variables))
    assert (ended.code, ended.out) == (130, "installing\n")
    assert ended.err.endswith("interrupted\n")
    assert "run_main.py" not in ended.err, "a traceback of ours"
    assert main_job().code == 0 and len(log(place)) == 2


def test_two_at_once_install_once(start, place, variables):
    both = [start(place / "setup" / "run_main.py", SLOW="1", **variables) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(log(place)) == 1
    for process in both:
        process.communicate()


def test_a_lock_of_a_killed_process_does_not_count(main_job, start, place, variables):
    killed = start(place / "setup" / "run_main.py", SLOW="60", **variables)
    killed.stdout.readline()
    os.killpg(killed.pid, 9)
    killed.communicate()
    assert main_job().code == 0


@pytest.mark.parametrize("damage", ["no pip", "no Python", "a link to nowhere"])
def test_an_environment_that_does_not_work_is_made_anew(damage, main_job, place):
    python = place / ".venv" / "bin" / "python"
    if damage == "no pip":
        next(place.glob(".venv/lib/python*/site-packages/pip.py")).unlink()
    else:
        python.unlink()
    if damage == "a link to nowhere":
        python.symlink_to("/no/such/python")
    ended = main_job(PIP_NO_INDEX="1", PIP_NO_BUILD_ISOLATION="0")  # the new environment has the real pip
    assert "Creating the environment" in ended.err
    assert ended.err.splitlines()[-1].startswith("error: pip could not install these packages")
    assert subprocess.run([python, "-c", "import pip"]).returncode == 0


def test_a_file_in_the_environments_place_is_reported_in_one_line(main_job, place):
    shutil.rmtree(place / ".venv")
    (place / ".venv").touch()
    ended = main_job()
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("error: the environment cannot be created")


def test_a_repository_that_cannot_be_written_is_reported_in_one_line(main_job, place):
    (place / ".venv.lock").mkdir()
    ended = main_job()
    (line,) = ended.err.splitlines()
    assert ended.code == 1 and "cannot be written" in line and "folder that you can write to" in line


def test_an_installed_repository_need_not_be_written(main_job, place):
    main_job()
    (place / ".venv.lock").unlink()
    (place / ".venv.lock").mkdir()
    assert main_job().code == 0


def test_its_own_lines_may_go_to_a_closed_pipe(place, variables, shell, tmp_path):
    line = f'"{place}/setup/run_main.py" 2>&1 > out | true'
    path = variables["PATH"]
    assert shell(f'export PATH="{path}" PYTHONPATH=; $PYTHON {line}').code == 0
    assert len(log(place)) == 1 and (tmp_path / "out").read_text(encoding="utf-8")
