"""The set-up scripts: the platforms they reject, what they install, what the environment check finds."""

import ast
import subprocess
import sys

import nbformat
import pytest

import check_environment
import execute_notebooks
import make_environment
from book_assets.table import REPOSITORY


@pytest.fixture
def no_subprocess(monkeypatch, tmp_path):
    """Record the commands that would run, with a temporary environment folder."""
    commands = []

    def record(command, **_):
        commands.append([str(part) for part in command])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(make_environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(make_environment.subprocess, "run", record)
    (tmp_path / ".venv").mkdir()
    return commands


def test_an_unsupported_python_is_told_which_versions_are_supported(monkeypatch):
    monkeypatch.setattr(make_environment.sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"3\.10 to 3\.13"):
        make_environment.check_platform()


def test_an_intel_mac_is_sent_to_colab(monkeypatch):
    monkeypatch.setattr(make_environment.sys, "platform", "darwin")
    monkeypatch.setattr(make_environment.platform, "machine", lambda: "x86_64")
    with pytest.raises(SystemExit, match="Colab"):
        make_environment.check_platform()


def test_a_repeated_installation_does_nothing(no_subprocess, monkeypatch):
    monkeypatch.setattr(make_environment, "can_reach", lambda host: False)
    make_environment.install(make_environment.MAIN)
    assert len(no_subprocess) == 1
    make_environment.install(make_environment.MAIN)
    assert len(no_subprocess) == 1


def test_linux_without_a_gpu_gets_the_processor_build(no_subprocess, monkeypatch):
    monkeypatch.setattr(make_environment, "can_reach", lambda host: True)
    monkeypatch.setattr(make_environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(make_environment.sys, "platform", "linux")
    make_environment.install(make_environment.MAIN)
    assert make_environment.TORCH_CPU_INDEX in no_subprocess[0]
    assert no_subprocess[0][-1].startswith("torch==")


def test_linux_with_a_gpu_gets_the_usual_build(no_subprocess, monkeypatch):
    monkeypatch.setattr(make_environment, "can_reach", lambda host: True)
    monkeypatch.setattr(make_environment.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    make_environment.install(make_environment.MAIN)
    assert not any(make_environment.TORCH_CPU_INDEX in command for command in no_subprocess)


def test_a_failed_installation_is_not_taken_for_done(no_subprocess, monkeypatch):
    monkeypatch.setattr(make_environment, "can_reach", lambda host: False)
    monkeypatch.setattr(
        make_environment.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(SystemExit, match="pip could not install"):
        make_environment.install(make_environment.MAIN)
    assert not list(make_environment.VENV.iterdir())


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


def test_an_executed_notebook_keeps_its_tags_and_no_other_metadata(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1 + 1)")])
    notebook.cells[0].metadata = {"tags": ["nbval-check-output"], "collapsed": True}
    nbformat.write(notebook, tmp_path / "sum.ipynb")
    execute_notebooks.execute(tmp_path / "sum.ipynb")
    (cell,) = nbformat.read(tmp_path / "sum.ipynb", as_version=4).cells
    assert cell.metadata == {"tags": ["nbval-check-output"]}
    assert (cell.execution_count, cell.outputs[0].text) == (1, "2\n")
    assert [path.name for path in tmp_path.iterdir()] == ["sum.ipynb"]


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
