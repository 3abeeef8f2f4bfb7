"""Write the short film reviews with labels from the fragments in phrases.txt.

A review is two or three of these: an opening, a verdict, a closing line, and a frame with clauses in its
places. Most lines of phrases.txt have a positive and a negative version, so that both classes have the same
words. Each line is used in only one part of the data (train, validation or test). Rewrite the file with

    python appendix-E/film_reviews/short_reviews/make_reviews.py
"""

import argparse
import random
import re
from dataclasses import dataclass
from pathlib import Path

from book_assets.command_line import command

# isort: split
from book_assets.files import check_outputs, write_whole
from book_assets.table import EMBEDDED_REVIEWS
from film_reviews.reviews import COLUMNS, SENTIMENTS, SHORT_SIZES

FRAGMENTS = Path(__file__).resolve().parent / "phrases.txt"
THEMES = ("film", "film", "film", "series", "documentary", "children")
SHARES = {"validation": 0.12, "test": 0.23}  # of a group's lines; the rest is for training
COMPOSITIONS = (  # the groups of a review's lines, drawn with equal probability
    ("opening", "plain", "agree"), ("opening", "plain", "plain"), ("opening", "agree", "plain"),
    ("plain", "agree", "closing"), ("plain", "plain", "closing"), ("agree", "plain"), ("plain", "agree"),
    ("plain", "concede"), ("verdict", "agree"), ("opening", "concede"), ("opening", "expect"),
    ("opening", "verdict", "closing"),
)
PLACE = re.compile(r"\{(-?)(aspect|trait|whole)\}")
BLANKS = {name: words.split("|") for name, words in {
    "good": (
        "beautiful|brilliant|charming|clever|delightful|fine|fresh|gripping|lovely|moving|perfect|strong|"
        "superb|thrilling|wonderful"
    ),
    "bad": (
        "boring|clumsy|dreadful|dreary|dull|feeble|flat|hollow|lifeless|messy|poor|predictable|shallow|"
        "tedious|terrible|weak"
    ),
    "well": "beautifully|brilliantly|carefully|cleverly|superbly|well|wonderfully",
    "badly": "badly|carelessly|clumsily|dreadfully|lazily|poorly|terribly",
    "loved": "admired|adored|enjoyed|loved|treasured",
    "hated": "disliked|hated|loathed|regretted|resented",
    "treat": "delight|gem|joy|marvel|pleasure|treat|triumph",
    "bore": "bore|chore|disappointment|failure|mess|nuisance|waste of time",
    "kin": "aunt|brother|colleague|cousin|daughter|father|flatmate|mother|neighbour|sister|son|uncle",
    "when": (
        "last night|last week|on a long flight|on a night train|on a wet Sunday|on New Year's Eve|"
        "on the first day of the holidays|over two evenings|the other day|with a cold and a pot of tea"
    ),
    "worker": (
        "baker|beekeeper|bell-ringer|bus driver|clockmaker|dentist|ferry pilot|judge|lighthouse keeper|"
        "locksmith|night nurse|piano tuner|postwoman|retired boxer|taxi driver|translator|vet|widow"
    ),
    "place": (
        "border post|boarding school|closed factory|desert town|fishing village|lighthouse|mining town|"
        "mountain hotel|public library|railway station|seaside town|small bakery|swimming pool|vineyard"
    ),
    "n": "three|four|five|six|seven|eight|nine|ten|twelve",
    "kind": "films like this|stories of this sort|things of this kind|quiet stories|stories like it",
}.items()}


@dataclass(frozen=True)
class Review:
    """A review, its part of the data, its label (1: positive) and the lines of phrases.txt it is made of."""

    part: str
    label: int
    text: str
    lines: tuple


def read_phrases(path=FRAGMENTS):
    """Return {group, or group and theme: lines} of a phrases file; its first lines explain the notation."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    blocks = (block.strip().splitlines() for block in "\n".join(lines).split("== ")[1:])
    return {header: lines for header, *lines in blocks}


def say_as(label, text):
    """Return the positive (label 1) or negative (0) version of a line: in <a/b>, a or b."""
    return re.sub("<([^/>]*)/([^>]*)>", lambda match: match[1 if label else 2], text)


def capitalise(text):
    """Return the text with a capital letter at the beginning of each sentence."""
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


class Reviewer:
    """Draws reviews. `draw` returns a random number in [0, 1), as `random.random` does.

    Only that function is used: its sequence is the same in all Python versions.
    """

    def __init__(self, phrases, draw):
        self.phrases = phrases
        self.draw = draw
        self.parts = {line: part for lines in phrases.values() for line, part in self.assign_lines(lines)}
        self.kept = set()
        self.uses = {}

    def pick(self, items):
        return items[int(self.draw() * len(items))]

    def assign_lines(self, lines):
        """Yield (line, part of the data that may use it) for one group."""
        mixed = [line for _, line in sorted((self.draw(), line) for line in lines)]
        names = [name for name, share in SHARES.items() for _ in range(max(1, round(share * len(lines))))]
        yield from zip(mixed, [*names, *["train"] * (len(lines) - len(names))], strict=True)

    def draw_line(self, group, theme, part, used):
        """Return the least used of three random lines with another beginning than those in `used`."""
        lines = [*self.phrases.get(group, ()), *self.phrases.get(f"{group} {theme}", ())]
        taken = {line.split(" <")[0] for line in used if group in ("aspect", "trait")}
        allowed = [
            line for line in lines
            if self.parts[line] == part and line not in used and line.split(" <")[0] not in taken
        ]
        return min((self.pick(allowed) for _ in range(3)), key=lambda line: self.uses.get(line, 0))

    def draw_review(self, part, label, shape):
        """Return a review of lines from the groups in `shape`, which may be like an earlier one."""
        theme, lines = self.pick(THEMES), []

        def fill_place(match):
            line = self.draw_line(match[2], theme, part, lines)
            lines.append(line)
            return say_as(1 - label if match[1] else label, line)

        sentences = []
        for group in shape:
            line = self.draw_line(group, theme, part, lines)
            lines.append(line)
            sentences.append(PLACE.sub(fill_place, say_as(label, line)))
        return Review(part, label, capitalise(self.choose_words(" ".join(sentences))), tuple(lines))

    def choose_words(self, text):
        """Return the text with one wording of every [a|b] and a word for every {name}."""
        text = re.sub(r"\[([^]]*)\]", lambda match: self.pick(match[1].split("|")), text)
        return re.sub(r"\{(\w+)\}", lambda match: self.pick(BLANKS[match[1]]), text)

    def write(self, part, label, attempts=500):
        """Return a review that differs from each earlier one of its label by more than the words in it.

        Raises RuntimeError if there are too few fragments.
        """
        shape = self.pick(COMPOSITIONS)
        for _ in range(attempts):
            review = self.draw_review(part, label, shape)
            if (label, frozenset(review.lines)) not in self.kept:
                self.kept.add((label, frozenset(review.lines)))
                self.uses.update((line, self.uses.get(line, 0) + 1) for line in review.lines)
                return review
        raise RuntimeError(f"no new review for the {part} part: add fragments to {FRAGMENTS.name}")


def make_reviews(sizes=SHORT_SIZES, seed=1):
    """Return the reviews of all parts, half of each part positive, the same list on every machine."""
    reviewer = Reviewer(read_phrases(), random.Random(seed).random)
    return [reviewer.write(part, n % 2) for part, size in sizes.items() for n in range(size)]


def format_table(reviews):
    """Return the reviews as text: a heading, then `part<TAB>label<TAB>text` lines."""
    lines = (f"{review.part}\t{SENTIMENTS[review.label]}\t{review.text}\n" for review in reviews)
    return "".join(["\t".join(COLUMNS) + "\n", *lines])


@command
def main(arguments=None):
    """Run the command, see --help."""
    parser = argparse.ArgumentParser(description="Write the short film reviews with labels.")
    parser.add_argument("--output", type=Path, default=EMBEDDED_REVIEWS, help="default: %(default)s")
    output = parser.parse_args(arguments).output
    check_outputs(output)
    reviews = make_reviews()
    write_whole(output, format_table(reviews))
    print(f"{len(reviews)} reviews written to {output}")


if __name__ == "__main__":
    main()
