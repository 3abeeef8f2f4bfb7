"""What all chapters share: the choice of model and data, paths, the tokenizer.

`table` lists every download, `downloads` fetches them, and `setup/fetch_assets.py` is the command for both.
`DOWNLOADS.md` explains the variables LLM_ASSETS, LLM_CACHE_DIR and NOTEBOOK_QUICK.
"""

import json
import os
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from book_assets.table import DOWNLOADS, EMBEDDED_MODEL

# The choice of assets

MODELS = {"book": "OpenAI's GPT-2", "embedded": "gpt2-tiny, this repository's own small GPT-2"}
DATA = {
    "book": "the book's texts (UCI's SMS Spam Collection, The Verdict)",
    "embedded": "this repository's own texts (sample messages, short reviews, a short story)",
}


class AssetsError(ArgumentTypeError, ValueError):
    """The text is not a choice of assets. argparse prints the message unchanged."""


@dataclass(frozen=True)
class Choice:
    """Which model and which data to use, each "book" (downloaded) or "embedded" (in the repository)."""

    model: str
    data: str

    @classmethod
    def parse(cls, text):
        """Return the choice for "book", "embedded" or, for example, "model=embedded,data=book".

        Raises AssetsError, a ValueError, for any other text.
        """
        known = {word: cls(word, word) for word in MODELS}
        for model, data in product(MODELS, DATA):
            choice = cls(model, data)
            known |= {f"model={model},data={data}": choice, f"data={data},model={model}": choice}
        words = re.sub(r"\s*([=,])\s*", r"\1", text.strip())
        if words not in known:
            raise AssetsError(
                f"{text!r} is not a choice of assets: use book, embedded, or model=WORD,data=WORD "
                "with one of these two words for each"
            )
        return known[words]

    def model_size(self, size="124M"):
        """Return the size of GPT-2 to load: "tiny" if the embedded model is chosen, else `size`.

        Raises AssetsError for another size of the embedded model.
        """
        if self.model == "embedded" and size not in ("124M", "tiny"):
            raise AssetsError(f"the embedded model has one size, tiny: choose model=book for {size}")
        return "tiny" if self.model == "embedded" else size

    def __str__(self):
        return f"model={self.model}: {MODELS[self.model]}\ndata={self.data}: {DATA[self.data]}"


def choose_assets(default="book"):
    """Return the `Choice` in the variable LLM_ASSETS, or that of `default` if it is unset or empty.

    Raises AssetsError, as `Choice.parse` does.
    """
    text = os.environ.get("LLM_ASSETS", "").strip()
    try:
        return Choice.parse(text or default)
    except AssetsError as error:
        raise AssetsError(f"the environment variable LLM_ASSETS: {error}" if text else str(error)) from None


def is_quick():
    """Return whether NOTEBOOK_QUICK asks the notebooks for short training runs: unset, empty, 0 or 1.

    The words false, no and off, true, yes and on are understood as well; ValueError for any other.
    """
    word = os.environ.get("NOTEBOOK_QUICK", "").strip().lower()
    if word not in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        raise ValueError(f"NOTEBOOK_QUICK={word}: set it to 1 for short training runs, or unset it")
    return word in ("1", "true", "yes", "on")


def in_cache(path):
    """Return `path` in the folder of downloads, if it is relative; all chapters share that folder.

    It is LLM_CACHE_DIR (~ and ~name stand for a home folder; one that does not exist is taken as an
    ordinary name), else `downloads` in the repository.
    """
    cache = os.environ.get("LLM_CACHE_DIR") or DOWNLOADS
    return Path(os.path.expanduser(cache)).absolute() / path


# The tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


def get_tokenizer(folder=EMBEDDED_MODEL):
    """Return GPT-2's tokenizer, made from vocab.bpe and encoder.json in `folder` without network access.

    It encodes as `tiktoken.get_encoding("gpt2")` does. Raises FileNotFoundError if a file is missing,
    ValueError if the two do not belong together or are not GPT-2's.
    """
    import tiktoken

    ids = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
    merges = (Path(folder) / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    byte_of = printable_bytes()
    ours = (
        isinstance(ids, dict) and END_OF_TEXT in ids and set().union(*ids) <= byte_of.keys()
        and set(ids.values()) == {*range(len(ids))}
    )
    if not ours or any(ids.get(merge.replace(" ", "")) != 256 + n for n, merge in enumerate(merges)):
        raise ValueError(
            f"vocab.bpe and encoder.json in {folder} are not GPT-2's or do not belong together: "
            "fetch both again"
        )
    end_of_text = ids.pop(END_OF_TEXT)
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in ids.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text}
    )


def printable_bytes():
    """Return {character of encoder.json: byte}; the unprintable bytes have characters from U+0100 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
