"""Both spellings of the printed imports give the same objects, from any directory, without side effects."""

import subprocess
import sys

import pytest

from book_assets.table import REPOSITORY

MODULES = [
    "ch04", "ch05", "gpt_download", "ch06", "appendix_e", "lora_in_practice", "finetune_spam", "listings",
    "benchmark.run",
]
SPELLINGS = """
import ch04, ch05, ch06, chapter04, chapter05, chapter06, gpt_download
assert chapter04 is ch04 and chapter05 is ch05 and chapter06 is ch06
from chapter04 import GPTModel, generate_text_simple
from chapter05 import load_weights_into_gpt, text_to_token_ids
from chapter06 import SpamDataset, train_classifier_simple
from gpt_download import download_and_load_gpt2
assert GPTModel is ch04.GPTModel is ch05.GPTModel
assert SpamDataset is ch06.SpamDataset and load_weights_into_gpt is ch05.load_weights_into_gpt
print(ch04.__file__, ch05.__file__, ch06.__file__)
"""


def python(code, cwd):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("folder", [".", "ch04", "ch06", "appendix-E", "appendix-E/topics", "tests", None])
def test_both_spellings_work_from_any_directory(folder, tmp_path):
    output = python(SPELLINGS, tmp_path if folder is None else REPOSITORY / folder)
    assert output.split() == [str(REPOSITORY / name / f"{name}.py") for name in ("ch04", "ch05", "ch06")]


IMPORT = """
import sys, torch
before = torch.get_rng_state()
import {module}
assert torch.equal(before, torch.get_rng_state()), "random numbers were drawn"
assert "tensorflow" not in sys.modules and not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize("module", MODULES)
def test_importing_has_no_side_effects_and_needs_neither_tensorflow_nor_a_gpu(module, tmp_path):
    assert python(IMPORT.format(module=module), tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
