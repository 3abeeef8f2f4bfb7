"""`compare_with_book` prints a run's numbers beside the book's."""

import math
from decimal import Decimal


def compare_with_book(rows, *, book="book", here="this run"):
    """Print a table of this run's numbers beside the printed ones, with a verdict for each row.

    - `rows`: {what: (this run's number, the book's as it is printed)}, for example
      {"training loss": (losses[0], "10.988"), "test": (accuracy, "95.67 %")}. A number may be a tensor
      or a sequence; the printed text then has as many numbers, separated by spaces. With % in the
      printed text, this run's number is a fraction.
    - `book`, `here`: the titles of the two columns; name the models there if they differ

    This run's number is rounded to the printed decimals. The verdict is "as in the book" if all are
    equal then, else the (largest) difference. Raises ValueError if the counts differ.
    """
    table = [("", book, here, "")]
    table += [(what, printed, *judge(what, number, printed)) for what, (number, printed) in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    for what, printed, number, verdict in table:
        line = f"{what:<{widths[0]}}  {printed:>{widths[1]}}  {number:>{widths[2]}}  {verdict}"
        print(line.rstrip())


def judge(what, number, printed):
    """Return this run's numbers as text, in the printed form, and the verdict."""
    book = [part.replace("−", "-") for part in printed.replace("%", " ").split()]
    factor = 100 if "%" in printed else 1
    here = [factor * float(value) for value in flatten(number)]
    if len(here) != len(book):
        raise ValueError(f"{what}: the book prints {len(book)} number(s), this run has {len(here)}")
    texts = [as_printed(value, model) for value, model in zip(here, book)]
    return " ".join(texts) + (" %" if "%" in printed else ""), find_verdict(texts, book)


def find_verdict(texts, book):
    if not all(map(math.isfinite, map(as_decimal, texts))):
        return "is not a number"
    differences = [as_decimal(ours) - as_decimal(theirs) for ours, theirs in zip(texts, book)]
    largest = max(differences, key=abs)
    return f"differs by {largest:+,f}" if largest else "as in the book"


def as_printed(value, model):
    """Return `value` with the decimals, the separators and the leading zero of the printed text `model`."""
    decimals = len(model.partition(".")[2])
    text = f"{value:,.{decimals}f}" if "," in model else f"{value:.{decimals}f}"
    return text.replace("0.", ".", 1) if model.lstrip("-").startswith(".") and abs(value) < 1 else text


def as_decimal(text):
    return Decimal(text.replace(",", ""))


def flatten(number):
    """Return the numbers of a tensor, an array, a nested sequence or a single number as a flat list."""
    number = number.tolist() if hasattr(number, "tolist") else number
    if isinstance(number, (list, tuple)):
        return [value for part in number for value in flatten(part)]
    return [number]
