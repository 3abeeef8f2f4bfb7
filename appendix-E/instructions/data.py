"""Instructions with their answers: loading them, and the prompt that the model sees.

An entry is a dictionary with "instruction", "input" (may be empty) and "output". The book's are chapter 7's
1,100; without a download there are 1,872 short ones, written for this repository
(short_instructions/README.md), which also have a "task".
"""

import json
from itertools import takewhile

from book_assets import in_cache
from book_assets.downloads import fetch
from book_assets.table import ASSETS, EMBEDDED_INSTRUCTIONS
from ch06 import SPLITS

FIELDS = ("instruction", "input", "output")
TRAIN, TEST = 0.85, 0.10  # of the book's entries, in order; the rest is for validation
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


# Loading


def load_instructions(choice, asset=ASSETS["instructions"]):
    """Return {"train", "validation", "test": entries}, lists of dictionaries.

    With choice.data "book" they are chapter 7's, downloaded if they are missing, and cut in their order: 935
    for training, the next 110 for testing, the last 55 for validation. With "embedded" they are the short
    ones. Raises DownloadError as `fetch` does, and ValueError for a damaged file.
    """
    if choice.data == "embedded":
        return load_short_instructions()
    path = fetch(asset, in_cache(asset.folder))
    entries = check_entries(read_instructions(path, "delete it, and it is downloaded again"))
    first, second = int(TRAIN * len(entries)), int(TRAIN * len(entries)) + int(TEST * len(entries))
    parts = entries[:first], entries[second:], entries[first:second]
    return dict(zip(SPLITS, parts, strict=True))


def load_short_instructions(path=EMBEDDED_INSTRUCTIONS):
    """Return the short instructions, {"train", "validation", "test": entries}.

    Their entries also have "task" and "new_wording", whether the wording occurs in no other part. Raises
    ValueError for a missing or damaged file.
    """
    remedy = "restore it with python appendix-E/instructions/short_instructions/make_instructions.py"
    parts = read_instructions(path, remedy)
    if not isinstance(parts, dict) or [*parts] != [*SPLITS]:
        raise ValueError(f"{path} has not the parts {', '.join(SPLITS)}: {remedy}")
    return {name: check_entries(entries) for name, entries in parts.items()}


def read_instructions(path, remedy):
    """Return the content of a JSON file; raise ValueError with the `remedy` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).strip()}): {remedy}") from error


def check_entries(entries):
    """Return `entries`; raise ValueError unless they are dictionaries, one at least, with FIELDS of text."""
    if not isinstance(entries, list) or not entries:
        raise ValueError("there are no entries: give a list of dictionaries")
    for number, entry in enumerate(entries):
        texts = [entry.get(name) if isinstance(entry, dict) else None for name in FIELDS]
        if not all(isinstance(text, str) for text in texts) or not texts[0].strip():
            raise ValueError(f"entry {number} must have the texts {', '.join(FIELDS)}; only an instruction "
                             "must not be empty")
    return entries


# The prompt


def format_prompt(entry):
    """Return the text in front of an answer: Alpaca's format, which chapter 7 uses.

    It ends with the line end after "### Response:", so that the answer begins a new token. An empty input
    has no section. Source: section 7.2; Taori et al. 2023 (Stanford Alpaca).
    """
    given = f"\n\n### Input:\n{entry['input']}" if entry["input"] else ""
    asked = f"### Instruction:\n{entry['instruction']}{given}"
    return f"{PREAMBLE}\n\n{asked}\n\n### Response:\n"


def encode_entry(entry, tokenizer):
    """Return (token ids of prompt and answer, how many of them are the prompt's).

    Tokens are those of the whole text. Where an answer begins with white space, its first token may have
    swallowed the prompt's line end; the prompt then ends before that token. The end token is not included,
    see `collate`; its name in a text is read as plain text.
    """
    prompt = format_prompt(entry)
    alone = tokenizer.encode_ordinary(prompt)
    ids = tokenizer.encode_ordinary(prompt + entry["output"])
    common = takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids))
    return ids, sum(1 for _ in common)
