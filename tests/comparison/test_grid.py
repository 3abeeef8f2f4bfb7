"""The grid: a rate for each contender by validation loss, runs that are kept, differences seed by seed."""

import json
import math
import multiprocessing
import time
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from comparison.grid import best_rate, half_width, paired_differences, read_rows, run_grid, tabulate_grid

RATES, SEEDS = (0.1, 0.2, 0.3), (1, 2, 3)


@dataclass(frozen=True)
class Contender:
    title: str
    best: float = 0.2
    options: dict = field(default_factory=dict)


class Task:
    """A training without a model: its loss is the distance from the contender's best rate."""

    tuning_seeds = (101, 102)

    def __init__(self, seconds=0.0, data="none"):
        self.about = {"task": "made up", "data": data}
        self.done, self.seconds = [], seconds

    def loss(self, contender, rate, seed):
        return abs(rate - contender.best)

    def run(self, contender, rate, seed, tuning):
        self.done.append((contender.title, rate, seed, tuning))
        time.sleep(self.seconds)
        loss = self.loss(contender, rate, seed)
        numbers = {"trained": 7, "validation_loss": loss}
        return numbers if tuning else numbers | {"test": loss + seed}


class Diverging(Task):
    """A training that diverges from some rate on, in the given way."""

    def __init__(self, limit, way):
        super().__init__()
        self.limit, self.way = limit, way

    def loss(self, contender, rate, seed):
        if rate < self.limit:
            return 1 - rate  # the higher, the better
        if isinstance(self.way, str):
            raise ValueError(self.way)
        return self.way


def run(task, output, contenders=(Contender("one"), Contender("two", 0.3)), rates=RATES, seeds=SEEDS):
    return run_grid(task, contenders, output, rates, seeds, report=lambda line: None)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "runs.jsonl"


# What is trained


def test_each_contender_is_trained_with_the_rate_that_suits_it_and_every_seed(output):
    task = Task()
    runs = run(task, output)
    final = [each[:3] for each in task.done if not each[3]]
    assert final == [("one", 0.2, seed) for seed in SEEDS] + [("two", 0.3, seed) for seed in SEEDS]
    tuning = [each[:3] for each in task.done if each[3]]
    assert len(tuning) == len({*tuning}) == 2 * len(RATES) * len(task.tuning_seeds)
    assert len(runs) == len(task.done) and runs["tuning"].sum() == len(tuning)


def test_nothing_is_repeated_and_the_file_gives_the_same_table(output):
    first, again = run(Task(), output), Task()
    pd.testing.assert_frame_equal(run(again, output), first)
    assert again.done == []
    run(again, output, seeds=(*SEEDS, 4))
    assert again.done == [("one", 0.2, 4, False), ("two", 0.3, 4, False)]


@pytest.mark.parametrize("change", [
    {"best": 0.21}, {"options": {"key": 1}}, {"title": "three"},
])
def test_a_contender_with_other_settings_is_another_one(change, output):
    run(Task(), output, [Contender("one")])
    task = Task()
    run(task, output, [Contender(**{"title": "one", **change})])
    assert len(task.done) == 9


def test_another_task_in_the_same_file_is_another_one(output):
    run(Task(), output)
    task = Task(data="book")
    run(task, output)
    assert len(task.done) == 18


@settings(max_examples=30, deadline=None)
@given(lines=st.integers(0, 17), kept=st.floats(0, 1))
def test_a_killed_run_goes_on_where_it_stopped_wherever_its_last_line_was_cut(tmp_path_factory, lines, kept):
    output = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    expected = run(Task(), output)
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(whole[:lines]) + whole[lines][: int(kept * (len(whole[lines]) - 2))])
    task = Task()
    pd.testing.assert_frame_equal(run(task, output), expected)
    assert len(task.done) == len(whole) - lines
    assert len(read_rows(output)) == len(whole)


@pytest.mark.parametrize("line", ['{"options": {}', "null", "[1]", "5}", "}", "\xff}", '{"task": "made up"}'])
def test_lines_that_are_no_runs_of_this_task_change_nothing(line, output):
    output.write_text(line + "\n", encoding="latin-1")
    task = Task()
    assert len(run(task, output)) == len(task.done) == 18


def train_slowly(output, barrier):
    """In a process of its own: a comparison of trainings that take 0.05 s."""
    barrier.wait(60)
    run(Task(0.05), output)


def test_two_processes_share_one_file(output):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=train_slowly, args=(output, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    task = Task()
    assert len(run(task, output)) == 18 and task.done == []
    assert all(json.loads(line) for line in output.read_text(encoding="utf-8").splitlines())


# The choice of the rate


@pytest.mark.parametrize("way", [
    "the loss of step 7 is nan: lower the learning rate or alpha",
    "the logits are not finite: the model's training has diverged, train it again",
    math.nan, math.inf,
])
def test_a_diverged_run_is_a_row_with_the_reason_and_its_rate_is_never_chosen(way, output):
    task = Diverging(0.3, way)
    runs = run(task, output, [Contender("one")])
    assert {rate for _, rate, _, tuning in task.done if not tuning} == {0.2}
    diverged = runs[runs["rate"] == 0.3]
    assert len(diverged) == 2 and diverged["validation_loss"].isna().all() and diverged["diverged"].all()
    assert len(run(again := Task(), output, [Contender("one")])) == len(runs) and again.done == []


def test_a_contender_that_diverges_everywhere_is_named(output):
    with pytest.raises(ValueError, match="one diverges with every learning rate: add lower ones"):
        run(Diverging(0.0, math.nan), output)


def test_another_error_is_raised_as_it_is_and_is_no_row(output):
    with pytest.raises(ValueError, match="no linear layer"):
        run(Diverging(0.0, "no linear layer of GPTModel matches 'querry'"), output)
    assert read_rows(output) == []


def row(rate, loss):
    return {"title": "one", "rate": rate, "validation_loss": loss}


@pytest.mark.parametrize(("losses", "expected"), [
    ({0.1: [1.0, 3.0], 0.2: [2.2, 2.2]}, 0.1),  # by the mean, 2.0
    ({0.1: [0.1, 5.0], 0.2: [2.5, 2.5]}, 0.2),  # not by the best run
    ({0.1: [0.1, None], 0.2: [9.0, 9.0]}, 0.2),  # not where one run diverged
    ({0.1: [1.0, 1.0], 0.2: [1.0, 1.0]}, 0.1),
])
def test_the_rate_is_chosen_by_the_mean_of_the_tuning_seeds(losses, expected):
    assert best_rate([row(rate, loss) for rate, values in losses.items() for loss in values]) == expected


def test_the_tuning_runs_are_not_among_the_results(output):
    runs = run(Task(), output, [Contender("one"), Contender("two", 0.3)])
    assert runs.loc[runs["tuning"], "test"].isna().all()
    table = tabulate_grid(runs, "test", "one")
    assert table["mean"].tolist() == [2.0, 2.0]  # of the seeds 1, 2, 3


# Differences


def results(**columns):
    rows = [
        {"title": title, "seed": seed, "tuning": False, "rate": 0.1, "trained": 7, "test": value}
        for title, values in columns.items() for seed, value in enumerate(values, start=1)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)  # in any order


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=8))
def test_differences_and_their_interval_are_those_of_the_paired_t_test(pairs):
    one, two = map(np.array, zip(*pairs))
    mean, half = paired_differences(results(one=one, two=two), "test", "one")["two"]
    difference = two - one
    assert mean == pytest.approx(difference.mean(), abs=1e-12)
    if difference.std() > 1e-6:
        interval = scipy.stats.ttest_rel(two, one).confidence_interval(0.95)
        assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))


def test_the_interval_of_a_small_example_is_the_textbooks():
    table = tabulate_grid(results(one=[1, 2, 3], two=[2, 4, 3]), "test", "one", factor=100)
    assert table.loc["two", "difference"] == pytest.approx(100)  # 1, 2, 0
    assert table.loc["two", "interval"] == pytest.approx(100 * 4.303 / 3**0.5, rel=1e-3)  # t of 2 degrees
    assert table.loc["two", "spread"] == pytest.approx(100) and table.loc["two", "mean"] == pytest.approx(300)
    assert table.loc["one", ["difference", "interval"]].tolist() == [0, 0]
    assert math.isnan(half_width([1.0]))


@pytest.mark.parametrize(("runs", "reference", "message"), [
    (results(one=[1, 2], two=[1]), "one", "two lacks a seed, or has diverged with it"),
    (results(one=[1], two=[1, 2]), "one", "one lacks a seed"),
    (results(one=[1, 2], two=[1, math.nan]), "one", "two lacks a seed, or has diverged"),
    (results(one=[1, 2]), "LoRA", r"no test of LoRA: their titles are \['one'\]"),
    (results(one=[1, 2]).drop(columns="test"), "one", "no test of one"),
])
def test_what_cannot_be_compared_seed_by_seed_is_refused_by_name(runs, reference, message):
    with pytest.raises(ValueError, match=message):
        tabulate_grid(runs, "test", reference)


@pytest.mark.parametrize(("changes", "message"), [
    ({"contenders": []}, r"the contenders' titles must be some, each of them once, not \[\]"),
    ({"contenders": [Contender("one"), Contender("one", 0.3)]}, "titles must be some, each of them once"),
    ({"rates": ()}, "the rates must be some"), ({"rates": (0.1, 0.1)}, "the rates must be some"),
    ({"seeds": ()}, "the seeds must be some"), ({"seeds": (1, 1)}, "the seeds must be some"),
    ({"rates": (0.1, 0.0)}, r"the rates must be in \(0, 1\]"), ({"rates": (2.0,)}, "the rates must be in"),
    ({"rates": (math.nan,)}, "the rates must be in"), ({"seeds": (1, -1)}, "the seeds must be integers in"),
])
def test_what_cannot_be_compared_is_refused_before_any_training(changes, message, output):
    task = Task()
    with pytest.raises(ValueError, match=message):
        run(task, output, **changes)
    assert task.done == [] and not output.exists()


def test_a_file_that_cannot_be_written_is_refused_before_any_training(tmp_path):
    task = Task()
    with pytest.raises(ValueError, match="cannot be written"):
        run(task, tmp_path)
    assert task.done == []
