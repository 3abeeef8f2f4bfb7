"""Give each way to fine-tune the learning rate that suits it, then compare all with the same seeds.

`run_grid` trains every contender with every rate of one grid, chooses by the validation loss, and trains
again with that rate and new seeds. Each finished run is one line of JSON in a file, and none is repeated, so
that an interrupted comparison goes on where it stopped and several processes can share one file.
"""

import json
import math
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from scipy.stats import t as student

from book_assets.files import append_line, check_outputs

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (1, 2, 3, 4, 5)
DIVERGED = ("lower the learning rate", "has diverged")  # what the messages say


def run_grid(task, contenders, output, rates=RATES, seeds=SEEDS, report=print):
    """Return the runs of all `contenders` on `task`, a DataFrame of one row per run; train what is missing.

    - `task`: has `about`, a dictionary for JSON, `tuning_seeds` to choose the rate with, and
      `run(contender, rate, seed, tuning)`, which returns a dictionary of numbers, validation_loss among
      them, or raises ValueError if the training diverges
    - `contenders`: dataclasses with a `title`
    - `output`: the file of finished runs, one line of JSON each

    A row also has title, rate, seed and "tuning", whether it serves only to choose the rate. Raises
    ValueError, before any training, for titles, rates or seeds that are none, occur twice or are out of
    range, and if a contender diverges with every rate.
    """
    titles = [each.title for each in contenders]
    for name, values in (("contenders' titles", titles), ("rates", [*rates]), ("seeds", [*seeds])):
        if not values or len({*values}) < len(values):
            raise ValueError(f"the {name} must be some, each of them once, not {values}")
    if not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"the rates must be in (0, 1], not {[*rates]}: try 1e-4 and larger ones")
    if not all(0 <= seed < 2**63 for seed in seeds):
        raise ValueError(f"the seeds must be integers in [0, 2**63), not {[*seeds]}")
    check_outputs(output)
    rows = []
    for contender in contenders:
        tried = [
            find_or_run(task, contender, output, report, rate, seed, tuning=True)
            for rate, seed in product(rates, task.tuning_seeds)
        ]
        rate = best_rate(tried)
        rows += tried
        rows += [find_or_run(task, contender, output, report, rate, seed, tuning=False) for seed in seeds]
    return pd.DataFrame(rows)


def find_or_run(task, contender, output, report, rate, seed, tuning):
    """Return the run of `output` with these settings, or train and add it."""
    key = {**task.about, **asdict(contender), "rate": rate, "seed": seed, "tuning": tuning}
    key = json.loads(json.dumps(key))
    for row in read_rows(output):
        if key.items() <= row.items():
            return row
    numbers = run_once(task, contender, rate, seed, tuning)
    append_line(output, json.dumps(key | numbers, allow_nan=False))
    loss = numbers["validation_loss"]
    report(f"{task.about['task']}, {contender.title}, rate {rate:g}, seed {seed}: validation loss {loss}")
    return key | numbers


def run_once(task, contender, rate, seed, tuning):
    """Return the numbers of one training; if it diverges, no validation loss and the reason."""
    try:
        numbers = task.run(contender, rate, seed, tuning)
    except ValueError as error:
        if not any(words in str(error) for words in DIVERGED):
            raise
        return {"validation_loss": None, "diverged": str(error)}
    if infinite := [name for name, value in numbers.items() if not math.isfinite(value)]:
        return {"validation_loss": None, "diverged": f"{infinite[0]} is {numbers[infinite[0]]}"}
    return numbers


def read_rows(path):
    """Return the lines of a file of `run_grid` as dictionaries; a line that was cut off is left out."""
    if not Path(path).exists():
        return []
    with FileLock(f"{path}.lock"):  # not within another process's line
        lines = Path(path).read_bytes().splitlines()
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def best_rate(rows):
    """Return the rate with the lowest mean validation loss; raise ValueError if every one diverged."""
    losses = {}
    for row in rows:
        loss = math.inf if row["validation_loss"] is None else row["validation_loss"]
        losses.setdefault(row["rate"], []).append(loss)
    rate = min(losses, key=lambda rate: np.mean(losses[rate]))
    if np.mean(losses[rate]) == math.inf:
        raise ValueError(f"{rows[0]['title']} diverges with every learning rate: add lower ones to the grid")
    return rate


# Results


def finished_runs(rows, seeds=SEEDS, **about):
    """Return a DataFrame like `run_grid`'s of those contenders that have all `seeds` among the `rows`.

    `about` are fields that a row must have, such as task="spam".
    """
    runs = [row for row in rows if about.items() <= row.items()]
    done = {}
    for row in runs:
        if not row["tuning"] and row["validation_loss"] is not None:
            done.setdefault(row["title"], set()).add(row["seed"])
    titles = [title for title, have in done.items() if {*seeds} <= have]
    final = {*seeds}
    return pd.DataFrame([
        row for row in runs if row["title"] in titles and (row["tuning"] or row["seed"] in final)
    ])


def at_the_edge(runs):
    """Return the titles whose best rate is the lowest or highest that was tried: look further there."""
    tuning = runs[runs["tuning"].astype(bool)]
    tried = {title: group.to_dict("records") for title, group in tuning.groupby("title", sort=False)}
    ends = {title: {f(row["rate"] for row in rows) for f in (min, max)} for title, rows in tried.items()}
    return [title for title, rows in tried.items() if best_rate(rows) in ends[title]]


def paired_differences(runs, column, reference):
    """Return {title: (mean, half width)} of the differences to `reference`, seed by seed, without the tuning.

    The half width is that of Student's 95 % interval, 0 for the reference and NaN for a single seed.
    Raises ValueError for a column or reference that the runs lack, and if a contender lacks one of the
    reference's seeds.
    """
    final = runs[~runs["tuning"].astype(bool)]
    titles = [*final["title"].unique()]
    if column not in final or reference not in titles:
        raise ValueError(f"the runs have no {column} of {reference}: their titles are {titles}")
    table = final.pivot_table(index="seed", columns="title", values=column, dropna=False, sort=False)
    if table.isna().any(axis=None):
        lacking = table.columns[table.isna().any()][0]
        raise ValueError(f"{lacking} lacks a seed, or has diverged with it: finish the runs or leave it out")
    differences = table.sub(table[reference], axis=0)
    return {title: (differences[title].mean(), half_width(differences[title])) for title in table}


def half_width(values):
    """Return half the width of Student's 95 % interval around the mean of `values`."""
    if len(values) < 2:
        return math.nan
    return student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def tabulate_grid(runs, column, reference, factor=1.0):
    """Return a DataFrame of numbers, a row per contender: rate, trained, mean, spread, difference, interval.

    mean, spread (one standard deviation of the seeds), difference and interval (half the width of the
    difference to `reference`) are those of `column`, times `factor`.
    """
    differences = paired_differences(runs, column, reference)
    final = runs[~runs["tuning"].astype(bool)]
    rows = {}
    for title, group in final.groupby("title", sort=False):
        difference, width = differences[title]
        rows[title] = {
            "rate": group["rate"].iloc[0], "trained": group["trained"].iloc[0],
            "mean": factor * group[column].mean(), "spread": factor * group[column].std(),
            "difference": factor * difference, "interval": factor * width,
        }
    return pd.DataFrame(rows).T
