"""CHEATSHEET.md: its scores are those of the stored comparison, its estimates the calculator's."""

import json
import re
import shlex

import pytest

from book_assets.table import REPOSITORY
from lora.memory_estimate import GPT2_SHAPES, estimate_memory
from lora.peft_format import peft_alpha
from lora_in_practice import build_parser

FOLDER = REPOSITORY / "appendix-E"
SHEET = (FOLDER / "CHEATSHEET.md").read_text(encoding="utf-8")
PAGES = [SHEET, (FOLDER / "YOUR-PROJECT.md").read_text(encoding="utf-8")]
ROWS = re.findall(r"^\| `(--model .*?)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", SHEET, re.M)


def stored_comparison():
    """Return {method: text of its rows} of the stored tables in what-lora-buys.ipynb."""
    text = (FOLDER / "topics" / "what-lora-buys.ipynb").read_text(encoding="utf-8")
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    text = "\n".join("".join(output.get("data", {}).get("text/plain", "")) for output in outputs)
    rows = {}
    for line in text.replace("\xa0", " ").splitlines():
        name, _, values = line.partition("  ")
        rows[name] = rows.get(name, "") + f" {values} "
    return rows


@pytest.mark.parametrize("method, quoted", [
    *((f"LoRA, all layers, rank {rank}", score) for rank, score in (
        (1, "95.3 ± 0.6"), (2, "95.8 ± 0.2"), (4, "95.9 ± 0.2"), (8, "95.7 ± 0.3"), (16, "96.3 ± 0.7"),
        (32, "96.7 ± 1.0"),
    )),
    ("LoRA, query and value, rank 16", "95.4 ± 1.0"),
    ("all weights", "95.8 ± 0.5"), ("last block", "95.9 ± 0.2"),
    ("LoRA as printed, random weights", "86.4 ± 2.4"),
    ("LoRA, all layers, rank 16", "0.067"), ("all weights", "0.076"), ("last block", "0.026"),
    ("LoRA, all layers, rank 16", "1.336"), ("all weights", "49.484"),
])
def test_what_the_sheet_quotes_is_in_the_stored_comparison(method, quoted):
    assert quoted in SHEET and f" {quoted} " in stored_comparison()[method]


def test_the_sheet_quotes_no_other_scores():
    stored = " ".join(stored_comparison().values())
    assert all(score in stored for score in re.findall(r"\d+\.\d ± \d\.\d", SHEET))


def parse(command):
    return vars(build_parser().parse_args(shlex.split(command)))


@pytest.mark.parametrize("flags, estimate, tensors, process", ROWS, ids=[row[0] for row in ROWS])
def test_the_sheets_estimates_are_the_calculators_and_near_the_measurements(
    flags, estimate, tensors, process
):
    options = parse(f"memory {flags}")
    for name in ("command", "params", "language_model", "measure"):
        options.pop(name, None)
    total = estimate_memory(GPT2_SHAPES[options.pop("model")], **options).total / 1e6
    estimate, tensors, process = (int(text.replace(",", "")) for text in (estimate, tensors, process))
    assert round(total) == estimate
    assert tensors == pytest.approx(estimate, rel=0.1) and process > tensors


def test_the_commands_of_both_pages_are_understood():
    pattern = r"python appendix-E/lora_in_practice\.py ([^`\n]+)"
    commands = [command for page in PAGES for command in re.findall(pattern, page)]
    assert len(ROWS) == 12 and len(commands) >= 3
    for command in commands:
        assert parse(command)["command"].__name__ == f"{command.split()[0]}_command"


def test_the_books_alpha_becomes_pefts():
    printed = {"rank": 16, "alpha": 16, "scaling": "alpha"}
    assert peft_alpha(printed, rslora=False) == 256
    assert 64 / 16**0.5 == 256 / 16 == 16  # the same scale
    assert "lora_alpha=256" in SHEET and "lora_alpha=64" in SHEET
