"""A command reads and writes UTF-8, ends with one line, and does its work whatever becomes of its output."""

import os
from pathlib import Path

import pytest

from book_assets.table import REPOSITORY

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs the streams and signals of POSIX")
FULL_DISK = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
PROBE = """
import sys, time
from pathlib import Path
from book_assets.command_line import command, read_lines
from book_assets.files import replacing

@command
def main(arguments=None):
    what = sys.argv[1]
    if what == "print":
        print("a → b 🎁 é")
    elif what == "work":
        for number in range(20_000):
            print("line", number)
        Path("saved").touch()
    elif what == "unfinished line":
        print("a", end="")
    elif what == "read":
        print(ascii(read_lines()))
    elif what == "sleep":
        with replacing("file") as partial:
            partial.touch()
            print("started")
            time.sleep(60)
    elif what == "too much":
        import torch
        torch.empty(int(sys.argv[2]))
    else:
        raise eval(what)

main()
"""
HIDE = {  # a module in place of a package: what its import does
    "missing": "raise ModuleNotFoundError(\"No module named 'x'\", name='x')",
    "broken": "raise ImportError('DLL load failed', name='x')",
    "without its library": "raise OSError('lib.so: cannot open shared object file')",
}


@pytest.fixture(autouse=True)
def probe(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")


@pytest.fixture(params=["utf-8", "cp1252", "ascii", "utf-16"])
def encoding(request):
    return {"PYTHONIOENCODING": request.param, "PYTHONUTF8": "0"}


# Text


def test_output_is_utf_8_whatever_the_console_is(run, encoding):
    assert run("probe.py", "print", **encoding).out.splitlines() == ["a → b 🎁 é"]


def test_an_error_is_one_line_whatever_the_console_is(run, encoding):
    ended = run("probe.py", "ValueError('é → b: do this')", **encoding)
    assert (ended.code, ended.out, ended.err.splitlines()) == (1, "", ["error: é → b: do this"])


def test_input_is_utf_8_with_or_without_a_mark_and_either_line_end(run, encoding):
    for text in ("café\n🎁 a\x0cb\n", "\ufeffcafé\r\n🎁 a\x0cb"):
        ended = run("probe.py", "read", stdin=text.encode(), **encoding)
        assert ended.out.strip() == ascii(["café", "🎁 a\x0cb"])


def test_no_input_is_no_line(run):
    assert run("probe.py", "read").out.strip() == "[]"


@pytest.mark.parametrize("text", ["é".encode("cp1252"), "hi".encode("utf-16"), "hi".encode("utf-16-le")])
def test_input_in_another_encoding_is_refused_in_one_line(text, run):
    ended = run("probe.py", "read", stdin=text)
    assert ended.code == 1 and ended.err.startswith("error: standard input is not UTF-8")
    assert len(ended.err.splitlines()) == 1


@POSIX
@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_the_locale_changes_nothing(locale, run):
    assert run("probe.py", "print", LC_ALL=locale).out == "a → b 🎁 é\n"
    assert run("probe.py", "read", stdin="é".encode(), LC_ALL=locale).out == "['\\xe9']\n"


# Outputs that are gone


@POSIX
@pytest.mark.parametrize("sink", ["| true", "| head -1", ">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_reader_that_is_gone_does_not_stop_the_work(sink, shell, tmp_path):
    ended = shell(f"$PYTHON probe.py work {sink}")
    assert (ended.code, ended.err) == (0, "")
    assert (tmp_path / "saved").exists()


@FULL_DISK
def test_a_full_disk_does_not_stop_the_work_but_is_reported(shell, tmp_path):
    for what in ("work", "unfinished line"):
        ended = shell(f'$PYTHON probe.py "{what}" > /dev/full')
        assert ended.code == 1
        assert ended.err == "error: not all of the output could be written (No space left on device)\n"
    assert (tmp_path / "saved").exists()


@POSIX
@pytest.mark.parametrize("sink", ["2>&-", pytest.param("2> /dev/full", marks=FULL_DISK), "2>&1 | true"])
def test_an_error_that_nobody_reads_still_has_exit_code_1(sink, shell):
    assert shell(f'$PYTHON probe.py "ValueError(1)" {sink}').code == 1


# Ends


@POSIX
def test_ctrl_c_ends_with_one_word_and_leaves_nothing(start, interrupt, tmp_path):
    ended = interrupt(start("-u", "probe.py", "sleep"))
    assert (ended.code, ended.out, ended.err) == (130, "started\n", "interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.py"]


@pytest.mark.parametrize("error, line", [
    ("OSError(2, 'No such file', 'x')", "x: No such file"),
    ("FileNotFoundError('x is missing: fetch it')", "x is missing: fetch it"),
    ("ValueError()", "ValueError"),
    ("ImportError('take another format: it needs tensorflow')", "take another format: it needs tensorflow"),
    ("ImportError('no y', name='y')", "no y: python setup/check_environment.py says what to install"),
    ("MemoryError()", "not enough memory: take a smaller rank, batch or model"),
    ("RuntimeError('CUDA out of memory. Tried')", "not enough memory: take a smaller rank, batch or model"),
])
def test_a_users_error_is_one_line(error, line, run):
    ended = run("probe.py", error)
    assert (ended.code, ended.err.splitlines()) == (1, [f"error: {line}"])


@pytest.mark.parametrize("size", [10**15, 2**62, 10**30])
def test_more_than_the_memory_holds_is_one_line(size, run):
    ended = run("probe.py", "too much", str(size))
    assert ended.code == 1
    assert ended.err.splitlines() == ["error: not enough memory: take a smaller rank, batch or model"]


@pytest.mark.parametrize("error", ["KeyError(1)", "RuntimeError('memory format')", "TypeError(1)"])
def test_a_fault_of_the_program_keeps_its_traceback(error, run):
    ended = run("probe.py", error)
    assert ended.code == 1 and "Traceback" in ended.err


# Packages


@pytest.mark.parametrize("fault", HIDE)
@pytest.mark.parametrize("script, package", [
    ("setup/fetch_assets.py", "pooch"), ("setup/execute_notebooks.py", "nbformat"),
    ("ch06/sample_messages/make_messages.py", "pandas"), ("appendix-E/finetune_spam.py", "torch"),
    ("appendix-E/lora_in_practice.py", "safetensors"),
])
def test_a_package_that_cannot_be_imported_is_reported_in_one_line(script, package, fault, run, tmp_path):
    (tmp_path / f"{package}.py").write_text(HIDE[fault], encoding="utf-8")
    ended = run(REPOSITORY / script, "list", path=[tmp_path])
    assert ended.code == 1 and len(ended.err.splitlines()) == 1
    assert ended.err.startswith("error: ")
    assert "check_environment.py says what to install" in ended.err or fault == "without its library"


@POSIX
def test_ctrl_c_while_packages_are_imported_has_no_traceback(start, interrupt, tmp_path):
    sleep = "import time; print('importing', flush=True); time.sleep(60)"
    (tmp_path / "pooch.py").write_text(sleep, encoding="utf-8")
    ended = interrupt(start(REPOSITORY / "setup" / "fetch_assets.py", "list", path=[tmp_path]))
    assert ended.code in (130, -2) and ended.err == "interrupted\n"


def test_a_readers_own_program_keeps_its_tracebacks(run):
    code = "import sys, lora_in_practice; print(sys.excepthook is sys.__excepthook__)"
    assert run("-c", code).out.split() == ["True"]
