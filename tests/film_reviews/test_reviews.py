"""Reviews come with their labels and stars, in the file's order; texts for training are drawn once each."""

import gzip

import pytest

from book_assets import Choice
from book_assets.table import EMBEDDED_TEXT
from film_reviews.reviews import (
    SIZES,
    load_labelled,
    load_reviews,
    load_short_reviews,
    load_texts,
    read_reviews,
)

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


def test_another_part_and_the_embedded_reviews_are_refused(small):
    with pytest.raises(ValueError, match="part must be train or test, not 'validation'"):
        load_reviews(BOOK, "validation")
    with pytest.raises(ValueError, match="load_labelled returns them; for these, choose data=book"):
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


@pytest.fixture
def hundred(tmp_path, monkeypatch):
    """A folder of downloads with 100 reviews to train on, one of them twice, and 20 to test with."""
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    names = [f"{kind}/{n}_{stars}" for kind, stars in (("neg", 2), ("pos", 9)) for n in range(50)]
    write_reviews(tmp_path, "train", "".join(f"{name}\t{name.replace('/49_', '/48_')}\n" for name in names))
    write_reviews(tmp_path, "test", "".join(f"{name}\t{name}\n" for name in (*names[:10], *names[-10:])))


def test_a_fifth_of_the_training_part_at_most_is_for_validation(hundred):
    parts = load_labelled(BOOK)
    assert [*parts] == ["train", "validation", "test"]
    assert all([*part.columns] == ["Text", "Label"] for part in parts.values())
    assert (len(parts["train"]), len(parts["test"])) == (80, 20)
    assert 16 <= len(parts["validation"]) <= 20 and parts["train"]["Label"].sum() == 40


@pytest.mark.parametrize("seed", range(20))
def test_no_text_is_both_for_training_and_for_validation(seed, hundred):
    train, validation, _ = load_labelled(BOOK, seed=seed).values()
    assert not validation["Text"].isin(train["Text"]).any()
    assert {*train["Text"], *validation["Text"]} == {*load_reviews(BOOK, "train")["Text"]}


@pytest.mark.parametrize("choice", [BOOK, EMBEDDED])
def test_part_of_the_labelled_reviews_keeps_the_proportion_of_labels(choice, hundred):
    counts = {"train": 30, "test": 8}
    parts, whole = load_labelled(choice, counts), load_labelled(choice)
    assert {name: len(parts[name]) for name in counts} == counts
    assert parts["train"]["Label"].sum() == 15 and parts["test"]["Label"].sum() == 4
    assert parts["validation"].equals(whole["validation"])
    again, other = load_labelled(choice, counts), load_labelled(choice, counts, seed=5)
    assert parts["train"].equals(again["train"]) and not parts["train"].equals(other["train"])


def test_the_embedded_labelled_reviews_are_the_short_ones():
    for name, part in load_labelled(EMBEDDED).items():
        assert part.equals(load_short_reviews()[name])


@pytest.mark.parametrize("counts, says", [
    ({"train": 2000}, "2,000 reviews are wanted and 1,050 there: take fewer"),
    ({"val": 3}, "counts has the part 'val': take train, validation or test"),
])
def test_reviews_that_are_not_there_are_refused(counts, says):
    with pytest.raises(ValueError, match=says):
        load_labelled(EMBEDDED, counts)


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


def test_the_whole_dataset_is_split_as_documented(whole):
    train, validation, test = load_labelled(BOOK).values()
    assert (len(train), len(validation), len(test)) == (19_961, 5_000, 25_000)
    assert test["Label"].mean() == validation["Label"].mean() == 0.5
    assert abs(train["Label"].mean() - 0.5) < 1e-3  # 39 copies of validation reviews are left out
    assert test["Text"].isin({*train["Text"], *validation["Text"]}).sum() == 123


def test_the_texts_for_training_are_reviews_of_both_labels(whole):
    texts = load_texts(BOOK)
    assert {name: len(part) for name, part in texts.items()} == SIZES
    assert len({text for part in texts.values() for text in part}) == sum(SIZES.values())
    labels = load_reviews(BOOK, "train").set_index("Text")["Label"]
    positive = labels.loc[texts["train"]].mean()
    assert 0.45 < positive < 0.55
