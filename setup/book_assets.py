"""What the book's code runs on: the table of downloads, the switch between them and the embedded files.

    python setup/book_assets.py list                       # what is there, what is missing, how large
    python setup/book_assets.py fetch gpt2/124M sms-spam   # ahead of a flight; --all for everything
    python setup/book_assets.py tiktoken                   # tiktoken.get_encoding("gpt2") without a network

Needs only the standard library until a file is fetched, a tokenizer built or a figure shown.
`DOWNLOADS.md` beside this file explains the variables LLM_ASSETS, LLM_CACHE_DIR and NOTEBOOK_QUICK.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
EMBEDDED_MODEL = REPOSITORY / "ch05" / "gpt2-tiny"
EMBEDDED_TEXT = REPOSITORY / "ch05" / "short-story.txt"
EMBEDDED_MESSAGES = REPOSITORY / "ch06" / "sample_messages" / "SMSSpamCollection.tsv"

# The table of downloads


@dataclass(frozen=True)
class Member:
    """The one file that is wanted from a zip archive: its name there, size in bytes, SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A file to download: where from (in order), how many bytes, SHA-256, licence.

    `size` and `sha256` are None where they are not known: the asset is unpinned, and the hash of the
    first download is recorded and enforced from then on. An archive with a `member` is good if that
    member is, so that any mirror's zip serves. `folder` is where the book puts the file.
    """

    name: str
    filename: str
    sources: tuple
    size: int | None
    sha256: str | None
    licence: str
    member: Member | None = None
    folder: str = "."


OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2"
MIRROR = "https://f001.backblazeb2.com/file/LLMs-from-scratch"
HUGGING_FACE = "https://huggingface.co/openai-community"
GPT2_LICENCE = "modified MIT, OpenAI"
VOCABULARY = {  # the same two files for every size of GPT-2
    "encoder.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
DATA_FILE = "model.ckpt.data-00000-of-00001"
CHECKPOINTS = {  # size in bytes and SHA-256 of each file, as far as they are known
    "124M": {
        "checkpoint": (77, "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb"),
        "hparams.json": (90, "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318"),
        DATA_FILE: (497759232, "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"),
        "model.ckpt.index": (5215, "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687"),
        "model.ckpt.meta": (471155, "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b"),
    },
    "355M": {
        "checkpoint": (None, None),
        "hparams.json": (91, None),
        DATA_FILE: (1419292672, None),
        "model.ckpt.index": (10399, None),
        "model.ckpt.meta": (926519, None),
    },
}
CHECKPOINTS |= {size: dict.fromkeys(CHECKPOINTS["124M"], (None, None)) for size in ("774M", "1558M")}
SAFETENSORS = {  # repository and revision, size in bytes, SHA-256
    "124M": (
        "gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e", 548105171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "355M": ("gpt2-medium/resolve/main", None, None),
    "774M": ("gpt2-large/resolve/main", None, None),
    "1558M": ("gpt2-xl/resolve/main", None, None),
}


def gpt2_assets(model_size):
    """Yield the files of one GPT-2: OpenAI's checkpoint, its vocabulary, and Hugging Face's weights."""
    folder = f"gpt2/{model_size}"
    for file, (size, sha256) in (CHECKPOINTS[model_size] | VOCABULARY).items():
        sources = [f"{OPENAI}/models/{model_size}/{file}", f"{MIRROR}/gpt2/{model_size}/{file}"]
        if file in VOCABULARY and model_size != "124M":
            sources.append(f"{OPENAI}/models/124M/{file}")
        yield Asset(f"{folder}/{file}", file, tuple(sources), size, sha256, GPT2_LICENCE, folder=folder)
    repository, size, sha256 = SAFETENSORS[model_size]
    file = "model.safetensors"
    url = f"{HUGGING_FACE}/{repository}/{file}"
    yield Asset(f"{folder}/{file}", file, (url,), size, sha256, "MIT, OpenAI", folder=folder)


def bpe_assets():
    """Yield GPT-2's two vocabulary files from where tiktoken has them, and from the models' folders."""
    for file, (size, sha256) in VOCABULARY.items():
        sources = tuple(f"{root}/{file}" for root in (
            f"{OPENAI}/encodings/main", f"{OPENAI}/models/124M", f"{MIRROR}/gpt2/124M",
        ))
        yield Asset(f"gpt2-bpe/{file}", file, sources, size, sha256, GPT2_LICENCE, folder="gpt2-bpe")


SPAM = Asset(
    name="sms-spam",
    filename="sms_spam_collection.zip",
    sources=(
        "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        f"{MIRROR}/sms%2Bspam%2Bcollection.zip",
    ),
    size=203415,
    sha256="1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
    licence="CC BY 4.0, Almeida and Gómez Hidalgo, doi 10.24432/C5CC84",
    member=Member(
        "SMSSpamCollection", 477907, "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"
    ),
)
VERDICT = Asset(
    name="the-verdict",
    filename="the-verdict.txt",
    sources=(
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
        "ch02/01_main-chapter-code/the-verdict.txt",
    ),
    size=20479,
    sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    licence="public domain, Edith Wharton, 1908",
)
ASSETS = {
    asset.name: asset
    for asset in (*(a for size in CHECKPOINTS for a in gpt2_assets(size)), *bpe_assets(), SPAM, VERDICT)
}

# The switch

MODELS = {"book": "OpenAI's GPT-2", "embedded": "gpt2-tiny, this repository's own small GPT-2"}
DATA = {
    "book": "the book's texts (UCI's SMS Spam Collection, The Verdict)",
    "embedded": "this repository's own texts (sample messages, short story)",
}


@dataclass(frozen=True)
class Choice:
    """Which model and which data to use, each "book" (downloaded) or "embedded" (in the repository)."""

    model: str
    data: str

    def __str__(self):
        return f"model={self.model}: {MODELS[self.model]}\ndata={self.data}: {DATA[self.data]}"


def choose_assets(default="book"):
    """Return the `Choice` that LLM_ASSETS names, or `default` where the variable is not set or empty.

    Either is "book", "embedded", or the two apart, as in "model=embedded,data=book".
    Raises ValueError for anything else.
    """
    text = os.environ.get("LLM_ASSETS", "").strip() or default
    if text in MODELS:
        return Choice(text, text)
    parts = [part.strip().partition("=")[::2] for part in text.split(",")]
    if sorted(key for key, _ in parts) != ["data", "model"] or any(value not in MODELS for _, value in parts):
        raise ValueError(
            f'{text!r} is no choice of assets: use "book", "embedded", or "model=…,data=…" '
            "with one of the two words for each (environment variable LLM_ASSETS)"
        )
    return Choice(**dict(parts))


def is_quick():
    """Return whether NOTEBOOK_QUICK asks for short trainings: set, and neither empty nor 0."""
    return os.environ.get("NOTEBOOK_QUICK", "") not in ("", "0")


def in_cache(path):
    """Return `path`, put under LLM_CACHE_DIR if that variable is set and `path` is relative."""
    cache = os.environ.get("LLM_CACHE_DIR")
    return Path(cache).expanduser().absolute() / path if cache else Path(path)


# The tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


def get_tokenizer(folder=EMBEDDED_MODEL):
    """Return GPT-2's tokenizer from vocab.bpe and encoder.json in `folder`, without any network access.

    The encoding is `tiktoken.get_encoding("gpt2")`'s. Raises FileNotFoundError if a file is missing,
    ValueError if the two do not belong together.
    """
    import tiktoken

    ids = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
    merges = (Path(folder) / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    if any(ids.get(merge.replace(" ", "")) != 256 + rank for rank, merge in enumerate(merges)):
        raise ValueError(f"vocab.bpe and encoder.json in {folder} do not belong together: fetch both again")
    end_of_text = ids.pop(END_OF_TEXT)
    byte_of = printable_bytes()
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in ids.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text}
    )


def printable_bytes():
    """Return which byte each character of encoder.json stands for: unprintable ones follow from U+0100."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def fill_tiktoken_cache():
    """Copy the embedded vocabulary to where tiktoken looks before it downloads; return that folder.

    tiktoken's own rules: TIKTOKEN_CACHE_DIR, else DATA_GYM_CACHE_DIR, else the system's temporary folder;
    a file's name there is the SHA-1 of its URL.
    """
    chosen = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if chosen == "":
        raise ValueError("an empty TIKTOKEN_CACHE_DIR turns tiktoken's cache off: unset it or name a folder")
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / "data-gym-cache"
    folder.mkdir(parents=True, exist_ok=True)
    for file in VOCABULARY:
        name = hashlib.sha1(ASSETS[f"gpt2-bpe/{file}"].sources[0].encode()).hexdigest()
        shutil.copyfile(EMBEDDED_MODEL / file, folder / f"{name}.tmp")
        os.replace(folder / f"{name}.tmp", folder / name)
    return folder


# Figures


def show(fig, alt):
    """Display a matplotlib figure as a PNG with the alternative text `alt`, and close it."""
    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    display(Image(picture.getvalue(), alt=alt))


# The command


def readable(size):
    """Return a number of bytes as text: 497.8 MB; a question mark for None."""
    if size is None:
        return "?"
    if size < 1000:
        return f"{size} B"
    unit = "kB" if size < 1e6 else "MB" if size < 1e9 else "GB"
    return f"{size / {'kB': 1e3, 'MB': 1e6, 'GB': 1e9}[unit]:.1f} {unit}"


def named(names):
    """Return the assets with these names or under these folders, such as gpt2/124M."""
    found = []
    for name in names:
        matches = [a for a in ASSETS.values() if a.name == name or a.name.startswith(f"{name}/")]
        if not matches:
            groups = sorted({re.sub(r"/[^/]*$", "", asset) for asset in ASSETS})
            raise ValueError(f"no asset {name!r}: name one that `list` shows, or {', '.join(groups)}")
        found += matches
    return found


def list_assets(base):
    """Print a line for each asset: is it in the folder `base`, how large, pinned by a hash or not."""
    for asset in ASSETS.values():
        path = base / asset.folder / asset.filename
        state = "there" if path.exists() else "missing"
        size = path.stat().st_size if path.exists() else asset.size
        pin = "pinned" if asset.sha256 else "unpinned"
        print(f"{state:8} {readable(size):>9}  {pin:9} {asset.name:42} {asset.licence}")


def fetch_assets(assets, base):
    """Fetch all; return the reports of those that failed."""
    from book_downloads import DownloadError, fetch

    failures = []
    for asset in assets:
        try:
            path = fetch(asset, base / asset.folder)
            print(f"{asset.name}: {path} ({readable(path.stat().st_size)})")
        except DownloadError as error:
            failures.append(str(error))
    return failures


def main(arguments=None):
    parser = argparse.ArgumentParser(description="List or fetch what the book's code downloads.")
    parser.add_argument("command", choices=("list", "fetch", "tiktoken"))
    parser.add_argument("names", nargs="*", help="assets, or folders of them, such as gpt2/124M")
    parser.add_argument("--all", action="store_true", help="fetch everything in the table (about 23 GB)")
    parser.add_argument("--folder", default=in_cache("."), help="default: LLM_CACHE_DIR, else this folder")
    args = parser.parse_args(arguments)
    if args.command == "tiktoken":
        print(f"tiktoken finds GPT-2's vocabulary in {fill_tiktoken_cache()}")
        return
    base = Path(args.folder).absolute()
    print(f"folder {base}")
    if args.command == "list":
        return list_assets(base)
    try:
        assets = list(ASSETS.values()) if args.all else named(args.names)
    except ValueError as error:
        parser.error(str(error))
    if not assets:
        parser.error("name what to fetch, or give --all")
    if not os.environ.get("LLM_CACHE_DIR"):
        print(f"Notebooks look in their own folder, or here if you set LLM_CACHE_DIR={base}")
    if failures := fetch_assets(assets, base):
        sys.exit("\n\n".join(failures))


if __name__ == "__main__":
    main()
