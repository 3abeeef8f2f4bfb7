"""The main job and `classify` as processes: nothing is lost with their output, text is read as UTF-8.

gpt2-tiny is trained for one epoch on 40 short messages.
"""

import json
import os
from pathlib import Path

import pytest

from book_assets.table import REPOSITORY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs the streams of POSIX")
FULL_DISK = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
FEW_MESSAGES = """
import sys
import pandas as pd
import ch06
rows = [("spam", f"win a prize now, number {n}") for n in range(20)]
rows += [("ham", f"see you at home at {n}") for n in range(20)]
ch06.load_messages = lambda choice: pd.DataFrame(rows, columns=["Label", "Text"])
import finetune_spam
finetune_spam.main(sys.argv[1:])
"""
OPTIONS = "--assets embedded --epochs 1 --rank 2 --batch-size 8 --output-dir results"
FILES = {"loss.png", "accuracy.png", "results.json", "train.csv", "validation.csv", "test.csv"}
CLASSIFY = REPOSITORY / "appendix-E" / "lora_in_practice.py"


@pytest.fixture
def main_job(shell, tmp_path):
    """Return a function that runs the main job with this end of the shell's line."""
    (tmp_path / "job.py").write_text(FEW_MESSAGES, encoding="utf-8")

    def main_job(sink):
        return shell(f"$PYTHON job.py {OPTIONS} {sink}")

    return main_job


def assert_complete(folder):
    names = {path.name for path in folder.iterdir()}
    assert names > FILES and not [name for name in names if name.endswith(".partial")]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(results["train_accs"]) == 1
    assert results["accuracy_after"].keys() == {"train", "validation", "test"}


@pytest.mark.parametrize("sink, code", [
    ("| head -1", 0), (">&- 2>&- <&-", 0), pytest.param("> /dev/full", 1, marks=FULL_DISK),
])
def test_the_main_job_saves_everything_when_its_output_is_gone(sink, code, main_job, tmp_path):
    ended = main_job(sink)
    assert ended.code == code and "Traceback" not in ended.err
    full = "error: not all of the output could be written (No space left on device)\n"
    assert ended.err == (full if code else "")
    assert_complete(tmp_path / "results")


def test_classify_reads_the_same_text_on_every_console(main_job, run, tmp_path):
    assert main_job("").code == 0
    command = CLASSIFY, "classify", "--adapter", "results", "--json"
    text = "Café at 8? 🎁 £5 → “yes”".encode()
    plain, *others = [
        run(*command, stdin=stdin, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        for encoding, stdin in (
            ("utf-8", text + b"\n"), ("cp1252", text), ("ascii", b"\xef\xbb\xbf" + text + b"\r\n"),
        )
    ]
    answer = json.loads(plain.out)
    assert (plain.code, answer["text"]) == (0, text.decode())
    assert [ended.out for ended in others] == [plain.out] * 2
    ended = run(*command, stdin=text.decode().replace("🎁", "").encode("utf-16"))
    assert (ended.code, len(ended.err.splitlines())) == (1, 1)


def test_an_argument_of_bytes_that_are_not_utf_8_is_no_traceback(run):
    ended = run(CLASSIFY, "classify", "--adapter", os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff"))
    assert ended.code == 1 and len(ended.err.splitlines()) == 1 and "caf\\udce9" in ended.err


def test_the_variable_is_blamed_for_its_own_value_and_the_option_for_its_own(run):
    script = Path("appendix-E", "finetune_spam.py")
    ended = run(REPOSITORY / script, LLM_ASSETS="garbage")
    assert ended.code == 1
    assert ended.err.startswith("error: the environment variable LLM_ASSETS: 'garbage' is not a choice of")
    ended = run(REPOSITORY / script, "--assets", "rubbish", LLM_ASSETS="garbage")
    assert ended.code == 2
    assert "error: argument --assets: 'rubbish' is not a choice of assets" in ended.err.splitlines()[-1]
