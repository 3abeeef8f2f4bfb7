"""The short reviews: how they are made, what their parts share, and how hard they are without word order."""

import random
import re
from collections import Counter, defaultdict

import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from book_assets.table import EMBEDDED_REVIEWS
from film_reviews.reviews import SHORT_SIZES, load_short_reviews
from film_reviews.short_reviews import make_reviews as generator


@pytest.fixture(scope="module")
def reviews():
    return generator.make_reviews()


@pytest.fixture(scope="module")
def parts():
    return load_short_reviews()


def test_the_generator_writes_the_committed_file_byte_for_byte(reviews):
    assert generator.format_table(reviews).encode("utf-8") == EMBEDDED_REVIEWS.read_bytes()


def test_the_command_writes_the_file_it_is_told_to(tmp_path, capsys):
    generator.main(["--output", str(tmp_path / "copy.tsv")])
    assert (tmp_path / "copy.tsv").read_bytes() == EMBEDDED_REVIEWS.read_bytes()
    assert "1500 reviews written" in capsys.readouterr().out


def test_half_of_each_part_is_positive(parts):
    assert {name: len(part) for name, part in parts.items()} == SHORT_SIZES
    assert all(part["Label"].mean() == 0.5 for part in parts.values())


def test_a_line_of_the_phrases_is_used_in_one_part_only(reviews):
    seen = defaultdict(set)
    for review in reviews:
        for line in review.lines:
            seen[line].add(review.part)
    assert len(seen) > 450 and all(len(names) == 1 for names in seen.values())


def test_the_lines_of_the_phrases_are_distinct():
    lines = [line for group in generator.read_phrases().values() for line in group]
    assert len({line.lower() for line in lines}) == len(lines)


def test_no_text_occurs_twice(reviews):
    assert len({review.text.lower() for review in reviews}) == len(reviews) == 1500


def test_reviews_are_short_sentences_without_notation(parts):
    texts = [text for part in parts.values() for text in part["Text"]]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 10 and max(lengths) <= 70
    assert sum(15 <= length <= 45 for length in lengths) / len(lengths) > 0.9
    for text in texts:
        assert text.isascii() and re.fullmatch(r'[A-Z][^<>{}\[\]|/"\t]*[.!?]', text), text
        assert not re.search(r"(^|[.!?] )[a-z]|  |\ba [aeio]", text), text


def test_no_word_gives_the_label_away(reviews):
    number, positive = Counter(), Counter()
    for review in reviews:
        words = {*re.findall(r"[a-z'-]+", review.text.lower())}
        number.update(words)
        positive.update(words if review.label else ())
    advantage = {word: abs(positive[word] - number[word] / 2) for word in number}
    assert max(advantage.values()) / len(reviews) <= 0.05  # the best word is right in 55 %
    assert all(advantage[word] < 0.45 * number[word] for word in number if number[word] >= 100)


@pytest.mark.parametrize("vectorizer, stated", [
    (CountVectorizer(), 0.83), (CountVectorizer(ngram_range=(1, 2)), 0.827),
    (TfidfVectorizer(ngram_range=(1, 2)), 0.84),
])
def test_a_bag_of_words_gets_most_but_not_all_of_the_test_part(vectorizer, stated, parts):
    counts = vectorizer.fit_transform(parts["train"]["Text"])
    model = LogisticRegression(max_iter=1000).fit(counts, parts["train"]["Label"])
    accuracy = model.score(vectorizer.transform(parts["test"]["Text"]), parts["test"]["Label"])
    assert 0.75 <= accuracy <= 0.92
    assert accuracy == pytest.approx(stated, abs=0.01), "the README states it"


def test_the_positive_and_the_negative_version_of_a_line_share_their_other_words():
    line = "I expected to <hate/love> it, and I was <wrong/right>."
    assert generator.say_as(1, line) == "I expected to hate it, and I was wrong."
    assert generator.say_as(0, line) == "I expected to love it, and I was right."


def test_a_clause_on_the_other_side_has_the_other_label():
    phrases = {
        "concede": [f"{{-aspect}}, but {{whole}}: {n}." for n in range(3)],
        "aspect": [f"{n} is <up/down>" for n in range(3)], "whole": [f"{n} are <in/out>" for n in range(3)],
    }
    reviewer = generator.Reviewer(phrases, random.Random(1).random)
    for label, wanted in enumerate((r"\d is up, but \d are out: \d\.", r"\d is down, but \d are in: \d\.")):
        assert re.fullmatch(wanted, reviewer.draw_review("train", label, ("concede",)).text)


def test_too_few_fragments_are_an_error(monkeypatch):
    phrases = {group: [f"{group} {n}" for n in range(3)] for group in ("opening", "plain")}
    monkeypatch.setattr(generator, "COMPOSITIONS", [("opening", "plain")])
    reviewer = generator.Reviewer(phrases, random.Random(1).random)
    with pytest.raises(RuntimeError, match="add fragments"):
        for _ in range(2):
            reviewer.write("test", 1, attempts=5)


def test_a_missing_file_is_made_again(tmp_path):
    with pytest.raises(ValueError, match=r"none.tsv cannot be read .*make_reviews.py"):
        load_short_reviews(tmp_path / "none.tsv")


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text.partition("\n")[2], lambda text: text[: len(text) // 2],
    lambda text: text.rpartition("\ntest")[0] + "\n", lambda text: text.replace("positive\t", "good\t", 1),
    lambda text: text.replace("\t", " "), lambda text: text.replace("train", "training", 1),
    lambda text: re.sub(r"positive\t.*", "positive\t", text, count=1),
    lambda text: text + "test\tpositive\tMore.\n",
])
def test_a_damaged_file_is_made_again(damage, tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_text(damage(EMBEDDED_REVIEWS.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=r"reviews.tsv cannot be read .*make_reviews.py"):
        load_short_reviews(path)


def test_a_file_that_is_no_text_is_made_again(tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(ValueError, match=r"make_reviews.py"):
        load_short_reviews(path)
