"""Film reviews with labels, and texts to train a language model on.

The data are the Large Movie Review Dataset (IMDb): 25,000 reviews to train on and 25,000 to test with, half
of each positive (7 to 10 stars) and half negative (1 to 4). Source: Maas et al., "Learning Word Vectors for
Sentiment Analysis" (ACL 2011). Without a download there are 1,500 short reviews, written for this repository
(short_reviews/README.md).
"""

import csv
import gzip
import zlib

import pandas as pd
from sklearn.model_selection import train_test_split

from book_assets.imdb import fetch_reviews
from book_assets.table import EMBEDDED_REVIEWS, EMBEDDED_TEXT
from ch06 import SPLITS

NAME = r"^(neg|pos)/\d+_(\d+)$"  # label and stars
SIZES = dict(zip(SPLITS, (2000, 50, 100), strict=True))  # reviews in the parts of load_texts
SHORT_SIZES = dict(zip(SPLITS, (1050, 150, 300), strict=True))  # in the parts of load_short_reviews
COLUMNS = ("part", "label", "text")  # of the short reviews' file
SENTIMENTS = ("negative", "positive")
HELD_OUT = 5000  # reviews of IMDb's training part that load_labelled sets aside for validation


def load_reviews(choice, part):
    """Return a DataFrame of the reviews in `part`, "train" or "test": Text, Label (1: positive), Stars.

    The negative reviews come first, each kind in the order of its numbers in the dataset; `<br />` has become
    a line end. The dataset is downloaded if it is missing. Raises ValueError for another part or a damaged
    file, DownloadError as `fetch_reviews`, and ValueError for choice.data "embedded", whose labelled reviews
    `load_labelled` returns.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part must be train or test, not {part!r}")
    if choice.data == "embedded":
        raise ValueError(
            "the embedded reviews are short and have no stars: load_labelled returns them; for these, choose "
            "data=book, for example with LLM_ASSETS=model=embedded,data=book"
        )
    return read_reviews(fetch_reviews()[part])


def read_reviews(path):
    """Return the reviews of a file that `fetch_reviews` gives, as `load_reviews` does, in the file's order.

    Raises ValueError for a damaged file or other lines than a review's name, a tab and its text.
    """
    try:
        lines = pd.read_csv(
            path, sep="\t", header=None, names=["Name", "Text"], index_col=False, lineterminator="\n",
            quoting=csv.QUOTE_NONE, keep_default_na=False, compression="gzip",
        )
        names = lines["Name"].str.extract(NAME)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).strip()
        raise ValueError(f"{path} cannot be read ({reason}): delete it, and it is made again") from error
    if lines.empty or names.isna().any(axis=None) or not lines["Text"].str.strip().all():
        raise ValueError(
            f"a line of {path} is not a review's name, a tab and its text: delete it, and it is made again"
        )
    return pd.DataFrame({
        "Text": lines["Text"].str.replace("<br />", "\n", regex=False),
        "Label": (names[0] == "pos").astype(int),
        "Stars": names[1].astype(int),
    })


def load_short_reviews(path=EMBEDDED_REVIEWS):
    """Return {"train", "validation", "test": DataFrame} of the short reviews: Text, Label (1: positive).

    They were written for this repository; SHORT_SIZES are their numbers, half of each positive. Raises
    ValueError for a missing or damaged file.
    """
    try:
        lines = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, index_col=False)
        if tuple(lines.columns) != COLUMNS or not lines["text"].str.strip().all():
            raise ValueError("a line is not a part, a label and a text")
        found = {(part, label): len(some) for (part, label), some in lines.groupby(["part", "label"])}
        if found != {(part, label): size // 2 for part, size in SHORT_SIZES.items() for label in SENTIMENTS}:
            raise ValueError("reviews are missing or too many")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({str(error).strip()}): restore it with "
            "python appendix-E/film_reviews/short_reviews/make_reviews.py"
        ) from error
    reviews = pd.DataFrame({"Text": lines["text"], "Label": (lines["label"] == SENTIMENTS[1]).astype(int)})
    return {part: reviews[lines["part"] == part].reset_index(drop=True) for part in SPLITS}


def load_labelled(choice, counts=None, seed=123):
    """Return {"train", "validation", "test": DataFrame} of reviews to train a classifier on: Text, Label.

    With choice.data "embedded" these are the short reviews. With "book" they are IMDb's: for validation,
    5,000 reviews of the training part are drawn with `seed`, half of each label, and the rest is for
    training, but for copies of these. The test part is whole, as in published results; 123 of its 25,000
    reviews are also among the training ones.

    `counts`, for example {"train": 500}, draws that many reviews of a part with `seed`, in the proportion of
    its labels; other parts stay whole. Raises ValueError for another part or more reviews than there are, and
    what `load_reviews` and `load_short_reviews` raise.
    """
    counts = counts or {}
    if others := counts.keys() - {*SPLITS}:
        raise ValueError(f"counts has the part {min(others)!r}: take train, validation or test")
    parts = load_short_reviews() if choice.data == "embedded" else split_reviews(choice, seed)
    return {name: draw_labelled(part, counts.get(name, len(part)), seed) for name, part in parts.items()}


def split_reviews(choice, seed):
    """Return IMDb's reviews as `load_labelled` does, all of them."""
    learned, test = (load_reviews(choice, part)[["Text", "Label"]] for part in ("train", "test"))
    held_out = min(HELD_OUT, len(learned) // 5)
    train, validation = train_test_split(
        learned, test_size=held_out, stratify=learned["Label"], random_state=seed
    )
    return {"train": train[~train["Text"].isin(validation["Text"])], "validation": validation, "test": test}


def draw_labelled(reviews, count, seed):
    """Return `count` of the DataFrame `reviews`, each label with its share, drawn with `seed`."""
    if count > len(reviews):
        raise ValueError(f"{count:,} reviews are wanted and {len(reviews):,} there: take fewer")
    if count < 2 and count != len(reviews):
        raise ValueError(f"{count} reviews cannot have both labels: take at least 2")
    if count < len(reviews):
        reviews, _ = train_test_split(
            reviews, train_size=count, stratify=reviews["Label"], random_state=seed
        )
    return reviews.reset_index(drop=True)


def load_texts(choice, sizes=SIZES):
    """Return {"train", "validation", "test": texts}, lists of strings to train a language model on.

    With choice.data "book" these are reviews, `sizes` in number: training and validation texts are drawn
    from the dataset's training part with random_state 123, test texts from its test part; no text is drawn
    twice. With "embedded" they are three pieces of the repository's short story, its first 80 % of
    paragraphs, the next 10 % and the last 10 %. Raises ValueError for more reviews than there are, and what
    `load_reviews` raises.
    """
    if choice.data == "embedded":
        return cut_story(EMBEDDED_TEXT.read_text(encoding="utf-8"))
    ours = load_reviews(choice, "train")["Text"].drop_duplicates()
    others = load_reviews(choice, "test")["Text"].drop_duplicates()
    others = others[~others.isin(ours)]
    learned = draw_texts(ours, sizes["train"] + sizes["validation"])
    parts = learned[: sizes["train"]], learned[sizes["train"] :], draw_texts(others, sizes["test"])
    return dict(zip(SPLITS, parts, strict=True))


def draw_texts(texts, count):
    """Return `count` of the Series `texts`, drawn with random_state 123, as a list."""
    if count > len(texts):
        raise ValueError(f"{count:,} reviews are wanted and {len(texts):,} different ones there: take fewer")
    return texts.sample(count, random_state=123).tolist()


def cut_story(story):
    """Return the three parts of `story`, a list of one text each, cut between paragraphs (empty lines)."""
    paragraphs = story.strip().split("\n\n")
    first, second = (len(paragraphs) * tenths // 10 for tenths in (8, 9))
    parts = paragraphs[:first], paragraphs[first:second], paragraphs[second:]
    return {name: ["\n\n".join(part)] for name, part in zip(SPLITS, parts, strict=True)}
