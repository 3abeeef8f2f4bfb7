"""LoRA for embeddings and convolutions: neighbours, PEFT's gaps, tables, figures and the command."""

import json
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from book_assets import get_tokenizer
from comparison.digits import ADAPTATIONS, OTHER_RANKS, SHOTS
from comparison.grid import SEEDS, finished_runs, read_rows
from comparison.new_words import NEW_WORDS, READERS
from figures import find_faults
from topics import lora_embedding_conv
from topics.lora_embedding_conv import (
    FINISHED,
    compare_with_peft,
    neighbours,
    plot_by_shots,
    plot_filters,
    plot_images,
    plot_parts,
    plot_row_norms,
    plot_spectra,
    tabulate_means,
)

NORMAL = torch.Generator().manual_seed(1)
IMAGES = torch.randn(2, 4, 9, 9, generator=NORMAL)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_rows(task):
    """Runs of ADAPTATIONS, the later the worse, by a point each."""
    rows = []
    for place, each in enumerate(ADAPTATIONS):
        common = {"task": task, "title": each.title, "trained": 100 + place, "rate": 0.01,
                  "validation_loss": 1.0}
        rows.append({**common, "seed": 101, "tuning": True})
        for seed in SEEDS:
            accuracy = 0.9 + 0.01 * (seed - place)
            rows.append({**common, "seed": seed, "tuning": False, "test": accuracy, "old": 0.5})
    return rows


# Embeddings


def test_the_neighbours_are_frequent_words_nearest_first_without_the_word_itself():
    table = torch.randn(10_000, 8, generator=NORMAL)
    day, token = 43_453 % 10_000, get_tokenizer().encode(" Monday")[0]
    table[day] = table[token] + 0.01
    table[get_tokenizer().encode(",")[0]] = table[day]  # no word
    found = neighbours(table, day, count=3)
    assert found[0] == (" Monday", pytest.approx(1, abs=0.01))
    cosines = [cosine for _, cosine in found]
    assert cosines == sorted(cosines, reverse=True)
    assert all(word[0] == " " and word[1:].isalpha() and len(word) > 3 for word, _ in found)
    assert " Monday" not in dict(neighbours(table, token, count=3))


def test_what_all_rows_have_in_common_makes_no_neighbours():
    table = torch.randn(9_000, 8, generator=NORMAL)
    assert dict(neighbours(table + 5, 7)) == pytest.approx(dict(neighbours(table, 7)), abs=1e-4)


def test_the_rows_of_an_update_are_drawn_with_their_lengths_group_by_group():
    update = torch.zeros(100, 4)
    update[[90, 95], 0] = torch.tensor([3.0, -4.0])
    fig = plot_row_norms(update, {"new": [90, 95], "seen": [1, 2]})
    new, seen, others = fig.axes[0].lines
    assert new.get_ydata().tolist() == [3, 4] and not seen.get_ydata().any()
    assert len(others.get_ydata()) == 96 and not others.get_ydata().any()
    assert find_faults(fig) == []


# Convolutions


def test_peft_agrees_with_itself_where_it_hands_all_options_on():
    text = compare_with_peft(nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGES)
    assert float(text.rpartition(" ")[2]) < 1e-4


def test_an_error_of_peft_is_told_and_not_raised(monkeypatch):
    def fail(*_):
        raise NotImplementedError("no such layer\nat all")

    monkeypatch.setattr(lora_embedding_conv.peft, "get_peft_model", fail)
    assert compare_with_peft(nn.Conv2d(4, 6, 3), IMAGES) == "NotImplementedError: no such layer"


def test_the_filters_after_are_those_before_plus_the_update():
    before, update = torch.randn(16, 1, 3, 3, generator=NORMAL), torch.ones(16, 1, 3, 3)
    fig = plot_filters(before, update)
    kernels = [np.asarray(ax.images[0].get_array()) for ax in fig.axes[:48]]
    assert np.allclose(kernels[32], before[0, 0] + 1) and np.allclose(kernels[16], 1)
    limits = {ax.images[0].get_clim() for ax in fig.axes[:48]}
    assert len(limits) == 1 and sum(*limits) == 0
    assert find_faults(fig) == []


def test_a_spectrum_is_that_of_the_update_as_a_matrix():
    fig = plot_spectra({"one": torch.diag(torch.tensor([1.0, 3.0, 2.0])).reshape(3, 3, 1, 1)})
    assert fig.axes[0].lines[0].get_ydata().tolist() == pytest.approx([3, 2, 1])
    assert find_faults(fig) == []


def test_images_are_drawn_class_by_class():
    images, labels = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 8, 8), torch.arange(10) % 5
    fig = plot_images({"old": (images, labels), "new": (images, labels)})
    drawn = [int(ax.images[0].get_array()[0, 0]) for ax in fig.axes[:10]]
    assert drawn == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9] and len(fig.axes) == 20
    assert find_faults(fig) == []


def test_the_parts_of_a_weight_are_named_in_the_middle_of_their_blocks():
    fig = plot_parts(torch.eye(12)[:, :4])
    ax = fig.axes[0]
    assert [*ax.get_yticks()] == [1.5, 5.5, 9.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["query", "key", "value"]
    assert find_faults(fig) == []


# The comparisons


def test_the_stored_runs_are_those_of_the_contenders_and_complete():
    rows = read_rows(FINISHED)
    tasks = {"words": READERS} | {f"digits, {shots} each": ADAPTATIONS for shots in SHOTS}
    tasks["digits, 10 each"] = ADAPTATIONS + OTHER_RANKS
    for task, contenders in tasks.items():
        runs = finished_runs(rows, task=task)
        final = runs[~runs["tuning"]]
        for each in contenders:
            expected = json.loads(json.dumps(asdict(each))).items()
            own = [row for row in rows if row["task"] == task and expected <= row.items()]
            assert {row["seed"] for row in own if not row["tuning"]} == {*SEEDS}, (task, each.title)
        assert len(final) == len(contenders) * len(SEEDS)


def test_a_table_has_means_differences_and_further_columns_in_percent():
    runs = finished_runs(make_rows("digits"), task="digits")
    table = tabulate_means(runs, "test", "LoRA, rank 4", 100, ("old",))
    assert [*table.index] == [each.title for each in ADAPTATIONS]
    assert [*table["mean"]] == pytest.approx([93, 92, 91, 90])
    assert [*table["difference"]] == pytest.approx([0, -1, -2, -3])
    assert [*table["interval"]] == pytest.approx([0] * 4, abs=1e-6) and {*table["old"]} == {50}


def test_accuracies_are_drawn_over_the_number_of_images_for_each_contender():
    fig = plot_by_shots(dict.fromkeys(SHOTS, finished_runs(make_rows("digits"), task="digits")))
    lines = [container[0].get_ydata().tolist() for container in fig.axes[0].containers]
    assert lines == [pytest.approx([93 - place] * 3) for place in range(4)]
    assert find_faults(fig) == []


@pytest.mark.parametrize(("task", "given"), [
    ("words", [("words", 4)]), ("digits", [(5, 4), (10, 7), (20, 4)]),
])
def test_the_command_gives_each_task_its_contenders_and_rates(task, given, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(lora_embedding_conv, "WordsTask", lambda: "words")
    monkeypatch.setattr(lora_embedding_conv, "DigitsTask", lambda shots: shots)
    monkeypatch.setattr(
        lora_embedding_conv, "run_grid",
        lambda task, contenders, output, rates: seen.append((task, len(contenders), output, len(rates))))
    output = tmp_path / "runs.jsonl"
    lora_embedding_conv.main(["--task", task, "--output", str(output)])
    assert seen == [(*each, output, 6) for each in given]


def test_the_new_words_look_like_no_known_ones():
    assert all(len(get_tokenizer().encode(word)) > 1 for word in NEW_WORDS)
