"""Every download of the book's code, and the paths of the embedded model and texts."""

from __future__ import annotations  # the set-up commands run on any Python 3, to say which one is needed

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOWNLOADS = REPOSITORY / "downloads"
EMBEDDED_MODEL = REPOSITORY / "ch05" / "gpt2-tiny"
EMBEDDED_TEXT = REPOSITORY / "ch05" / "short-story.txt"
EMBEDDED_MESSAGES = REPOSITORY / "ch06" / "sample_messages" / "SMSSpamCollection.tsv"
EMBEDDED_REVIEWS = REPOSITORY / "appendix-E" / "film_reviews" / "short_reviews" / "reviews.tsv"


@dataclass(frozen=True)
class Member:
    """The file to extract from a zip archive: its name there, size in bytes, SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A file to download.

    Without `sha256` it is unpinned: the hash of the first download is recorded, and enforced from then on.
    """

    name: str
    filename: str
    sources: tuple  # URLs, in the order in which they are tried
    size: int | None  # in bytes, None if not known
    sha256: str | None  # None if not known
    licence: str
    member: Member | None = None  # an archive is good if this member is: any mirror's zip will do
    folder: str = "."  # where the book puts the file


OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2"
MIRROR = "https://f001.backblazeb2.com/file/LLMs-from-scratch"
HUGGING_FACE = "https://huggingface.co/openai-community"
GPT2_LICENCE = "modified MIT, OpenAI"
VOCABULARY = {  # the same two files for every size of GPT-2
    "encoder.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
DATA_FILE = "model.ckpt.data-00000-of-00001"
CHECKPOINTS = {  # size in bytes and SHA-256 of each file, None if not known
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
for size in ("774M", "1558M"):
    CHECKPOINTS[size] = dict.fromkeys(CHECKPOINTS["124M"], (None, None))
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
    """Yield the files of one size of GPT-2: OpenAI's checkpoint and vocabulary, Hugging Face's weights."""
    folder = f"gpt2/{model_size}"
    for file, (size, sha256) in {**CHECKPOINTS[model_size], **VOCABULARY}.items():
        sources = [f"{OPENAI}/models/{model_size}/{file}", f"{MIRROR}/gpt2/{model_size}/{file}"]
        if file in VOCABULARY and model_size != "124M":
            sources.append(f"{OPENAI}/models/124M/{file}")
        yield Asset(f"{folder}/{file}", file, tuple(sources), size, sha256, GPT2_LICENCE, folder=folder)
    repository, size, sha256 = SAFETENSORS[model_size]
    file = "model.safetensors"
    url = f"{HUGGING_FACE}/{repository}/{file}"
    yield Asset(f"{folder}/{file}", file, (url,), size, sha256, "MIT, OpenAI", folder=folder)


def bpe_assets():
    """Yield GPT-2's two vocabulary files, with tiktoken's source first."""
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
IMDB = Asset(  # its MD5, by which others pin it, is 7c2ac02c03563afcf9b574c7e56c153a
    name="imdb",
    filename="aclImdb_v1.tar.gz",
    sources=("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",),
    size=84125825,
    sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    licence="for research, cite Maas et al. 2011 (ACL)",
)
ASSETS = {
    asset.name: asset
    for asset in (*(a for size in CHECKPOINTS for a in gpt2_assets(size)), *bpe_assets(), SPAM, VERDICT, IMDB)
}
