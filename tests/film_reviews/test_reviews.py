"""Reviews come with their labels and stars, in the file's order; texts for training are drawn once each."""

import gzip

import pytest

from book_assets import Choice
from book_assets.table import EMBEDDED_TEXT
from film_reviews.reviews import SIZES, load_reviews, load_texts, read_reviews

BOOK, EMBEDDED = Choice("embedded", "book"), Choice("embedded", "embedded")
TRAIN = 'neg/0_3\tnull\nneg/2_1\tAn "open quotation mark<br /><br />next\nneg/3_4\tnull\npos/9_10\tÉlan\n'
TEST = "neg/0_2\tnull\npos/0_9\tFine.\npos/1_7\tGood\n"


def write_reviews(folder, part, lines):
    path = folder / "imdb" / f"{part}.tsv.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of downloads with few reviews."""
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    write_reviews(tmp_path, "train", TRAIN)
    write_reviews(tmp_path, "test", TEST)


@pytest.fixture
def whole(book_data, monkeypatch):
    """The real dataset as the folder of downloads."""
    monkeypatch.setenv("LLM_CACHE_DIR", str(book_data))


def test_a_review_has_its_text_label_and_stars(small):
    reviews = load_reviews(BOOK, "train")
    assert [*reviews.columns] == ["Text", "Label", "Stars"]
    assert reviews.to_numpy().tolist() == [
        ["null", 0, 3], ['An "open quotation mark\n\nnext', 0, 1], ["null", 0, 4], ["Élan", 1, 10],
    ]
    assert load_reviews(BOOK, "test")["Label"].tolist() == [0, 1, 1]


def test_another_part_and_the_embedded_texts_have_no_labels(small):
    with pytest.raises(ValueError, match="part must be train or test, not 'validation'"):
        load_reviews(BOOK, "validation")
    with pytest.raises(ValueError, match="no labelled reviews among the embedded texts: choose data=book"):
        load_reviews(EMBEDDED, "train")


@pytest.mark.parametrize("lines", [
    "neg/0_3 no tab\n", "ham\ttext\n", "neg/0_3\t\n", "neg/0_3\t  \n", "neg/x_3\ttext\n", "",
    "pos/0_9\ttext\npos/1_9\ttext\tmore\tand more\n", "neg/0_3.txt\ttext\n",
])
def test_another_file_is_refused(lines, tmp_path):
    with pytest.raises(ValueError, match="tsv.gz .*delete it, and it is made again"):
        read_reviews(write_reviews(tmp_path, "train", lines))


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"no gzip", lambda data: b""])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = write_reviews(tmp_path, "train", TRAIN)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="delete it, and it is made again"):
        read_reviews(path)


def test_no_text_is_in_two_parts(small):
    texts = load_texts(BOOK, {"train": 2, "validation": 1, "test": 2})
    assert {*texts["train"], *texts["validation"]} == {*load_reviews(BOOK, "train")["Text"]}
    assert {*texts["test"]} == {"Fine.", "Good"}  # the third one is also in the training part


def test_the_same_texts_are_drawn_every_time(small):
    sizes = {"train": 1, "validation": 1, "test": 1}
    assert load_texts(BOOK, sizes) == load_texts(BOOK, sizes)


def test_more_texts_than_there_are_is_an_error(small):
    with pytest.raises(ValueError, match="4 reviews are wanted and 3 different ones there: take fewer"):
        load_texts(BOOK, {"train": 3, "validation": 1, "test": 1})


def test_the_short_story_is_cut_into_three_parts_without_loss():
    texts = load_texts(EMBEDDED)
    assert [*texts] == ["train", "validation", "test"] and all(len(part) == 1 for part in texts.values())
    story = EMBEDDED_TEXT.read_text(encoding="utf-8").strip()
    assert "\n\n".join(text for part in texts.values() for text in part) == story
    shares = [len(text) / len(story) for (text,) in texts.values()]
    assert 0.7 < shares[0] < 0.9 and min(shares) > 0.05


def test_the_dataset_is_balanced_and_has_the_papers_stars(whole):
    for part in ("train", "test"):
        reviews = load_reviews(BOOK, part)
        assert len(reviews) == 25_000 and reviews["Label"].sum() == 12_500
        assert {*reviews["Stars"][reviews["Label"] == 0]} == {1, 2, 3, 4}
        assert {*reviews["Stars"][reviews["Label"] == 1]} == {7, 8, 9, 10}
        assert not reviews["Text"].str.contains("<br />").any()


def test_the_texts_for_training_are_reviews_of_both_labels(whole):
    texts = load_texts(BOOK)
    assert {name: len(part) for name, part in texts.items()} == SIZES
    assert len({text for part in texts.values() for text in part}) == sum(SIZES.values())
    labels = load_reviews(BOOK, "train").set_index("Text")["Label"]
    positive = labels.loc[texts["train"]].mean()
    assert 0.45 < positive < 0.55
