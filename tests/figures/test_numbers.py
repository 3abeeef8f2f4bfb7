"""Numbers beside the book's: rounded as printed, with a verdict that can fail."""

import pytest
import torch

from book_figures import compare_with_book
from book_figures.numbers import judge


@pytest.mark.parametrize(
    ("number", "printed", "text", "verdict"),
    [
        (10.98758, "10.988", "10.988", "as in the book"),
        (10.9874, "10.988", "10.987", "differs by -0.001"),
        (163009536, "163,009,536", "163,009,536", "as in the book"),
        (163009537, "163,009,536", "163,009,537", "differs by +1"),
        (0.9433, "95.67 %", "94.33 %", "differs by -1.34"),
        (0.95669, "95.67%", "95.67 %", "as in the book"),
        (-0.87191, "−.8719", "-.8719", "as in the book"),
        (torch.tensor([[0.1324], [0.2171]]), ".1324 .2170", ".1324 .2171", "differs by +0.0001"),
        (torch.tensor(3.5), "3.5", "3.5", "as in the book"),
        ([1, [2, 3]], "1 2 3", "1 2 3", "as in the book"),
        (float("nan"), "1.0", "nan", "is not a number"),
        (float("inf"), "1.0", "inf", "is not a number"),
    ],
)
def test_the_verdict_is_that_of_the_printed_decimals(number, printed, text, verdict):
    assert judge("x", number, printed) == (text, verdict)


def test_the_counts_must_agree():
    with pytest.raises(ValueError, match=r"means: the book prints 2 number\(s\), this run has 3"):
        judge("means", [1, 2, 3], "1 2")


def test_the_table_has_titles_and_one_line_per_row(capsys):
    rows = {"training loss": (10.98758, "10.988"), "test accuracy": (0.94, "98.00 %")}
    compare_with_book(rows, book="book, 124M", here="this run, tiny")
    assert capsys.readouterr().out.splitlines() == [
        "               book, 124M  this run, tiny",
        "training loss      10.988          10.988  as in the book",
        "test accuracy     98.00 %         94.00 %  differs by -4.00",
    ]
