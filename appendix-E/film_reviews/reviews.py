"""Film reviews with labels, and texts to train a language model on.

The data are the Large Movie Review Dataset (IMDb): 25,000 reviews to train on and 25,000 to test with, half
of each positive (7 to 10 stars) and half negative (1 to 4). Source: Maas et al., "Learning Word Vectors for
Sentiment Analysis" (ACL 2011).
"""

import csv
import gzip
import zlib

import pandas as pd
from sklearn.model_selection import train_test_split

from book_assets.imdb import fetch_reviews
from book_assets.table import EMBEDDED_TEXT
from ch06 import SPLITS

NAME = r"^(neg|pos)/\d+_(\d+)$"  # label and stars
VALIDATION = 5000  # of the training reviews
SIZES = dict(zip(SPLITS, (2000, 50, 100), strict=True))  # reviews in the parts of load_texts


def load_reviews(choice, part):
    """Return a DataFrame of the reviews in `part`, "train" or "test": Text, Label (1: positive), Stars.

    The negative reviews come first, each kind in the order of its numbers in the dataset; `<br />` has become
    a line end. The dataset is downloaded if it is missing. Raises ValueError for another part or a damaged
    file, DownloadError as `fetch_reviews`, and ValueError for choice.data "embedded", which has no labelled
    reviews.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part must be train or test, not {part!r}")
    if choice.data == "embedded":
        raise ValueError(
            "there are no labelled reviews among the embedded texts: choose data=book, for example with "
            "LLM_ASSETS=model=embedded,data=book"
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


def load_labelled(choice, counts=None, seed=123):
    """Return {"train", "validation", "test": DataFrame of Text and Label} to train a classifier with.

    With choice.data "book", 5,000 of the dataset's 25,000 training reviews are the validation part; a text
    that is in it as well as among the others is left out of these. `counts`, {part: number}, takes so many
    reviews of a part. All is drawn with `seed`, half of each label. Raises what `load_reviews` raises, and
    ValueError for more reviews than there are.
    """
    learned = load_reviews(choice, "train")
    train, validation = train_test_split(
        learned, test_size=VALIDATION, stratify=learned["Label"], random_state=seed
    )
    parts = (train[~train["Text"].isin(validation["Text"])], validation, load_reviews(choice, "test"))
    counts = counts or {}
    return {
        name: draw_labelled(part[["Text", "Label"]], counts.get(name, len(part)), seed)
        for name, part in zip(SPLITS, parts, strict=True)
    }


def draw_labelled(reviews, count, seed):
    """Return `count` rows of the DataFrame `reviews`, each label with its share, drawn with `seed`."""
    if count > len(reviews):
        raise ValueError(f"{count:,} reviews are wanted and {len(reviews):,} there: take fewer")
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
