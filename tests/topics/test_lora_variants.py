"""The comparison of LoRA's relatives: contenders, finished runs, tables and figures, on made-up rows."""

import json
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

from book_figures import PALETTE
from comparison.figures import plot_differences, plot_rates
from comparison.grid import RATES, SEEDS, at_the_edge, finished_runs, read_rows
from figures import drawn_texts, find_faults
from lora.adalora import Budget
from lora.layers import adapted_layers, apply_lora
from lora.optimizer import lora_adamw
from lora.wrappers import VARIANTS, with_lora
from models import IDS, small_gpt
from topics import lora_variants
from topics.lora_variants import (
    RELATIVES,
    RUNS,
    count_in_gpt2_small,
    first_update,
    fit_layer,
    kept_bytes,
    plot_budget,
    plot_first_updates,
    plot_ranks_left,
    plot_singular_values,
    ranks_by_layer,
    tabulate_costs,
    tabulate_results,
)

ABOUT = {"model": "tiny", "data": "book", "quick": False}
TITLES = ("LoRA", "DoRA", "VeRA")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_rows(task="spam", titles=TITLES):
    """Runs of `titles`: the first is best at 1e-3, the next ones at ten times the rate of the one before."""
    rows = []
    for place, title in enumerate(titles):
        best = 1e-3 * 10**place
        common = {"task": task, **ABOUT, "title": title, "trained": 1000 + place}
        for rate in RATES:
            loss = None if rate > 20 * best else 1 + abs(RATES.index(rate) - RATES.index(best))
            rows.append({**common, "rate": rate, "seed": 101, "tuning": True, "validation_loss": loss})
        for seed in SEEDS:
            rows.append({
                **common, "rate": best, "seed": seed, "tuning": False, "validation_loss": 1.0,
                "test": 0.9 + 0.01 * place + 0.02 * seed, "test_loss": 5 - 0.1 * place * seed,
            })
    return rows


COSTS = [
    {"task": "costs", "model": model, "title": title, "seconds_per_step": 0.05, "step_memory_bytes": 8e7,
     "kept_bytes": 7.1e7, "checkpoint_bytes": 67_000}
    for model, title in (("tiny", "LoRA"), ("124M", "LoRA"), ("124M", "LoRA-FA"))
]


# The contenders


def test_every_variant_is_compared_once_with_a_mean_rank_of_eight_or_veras_many():
    assert sorted(each.variant for each in RELATIVES) == sorted(VARIANTS)
    for each in RELATIVES:
        model = each.adapt(small_gpt(), "query", "head")
        branch = next(iter(adapted_layers(model).values())).lora
        assert getattr(branch, "target_rank", branch.rank) == (256 if each.title == "VeRA" else 8)
        assert all(p.requires_grad for p in model.out_head.parameters())


def test_all_start_with_the_scale_alpha_by_rank_but_rslora_and_vera():
    scales = {}
    for each in RELATIVES:
        layers = adapted_layers(each.adapt(small_gpt(), "query", ()))
        scales[each.title] = next(iter(layers.values())).lora.scale
    assert scales.pop("rsLoRA") == pytest.approx(16 / 8**0.5) and scales.pop("VeRA") == 1
    assert {*scales.values()} == {2.0}


def test_the_stored_runs_are_those_of_the_contenders():
    expected = {each.title: json.loads(json.dumps(asdict(each))) for each in RELATIVES}
    runs = [row for row in read_rows(RUNS) if row["task"] != "costs"]
    assert {row["title"] for row in runs} <= expected.keys() and len(runs) > 20
    assert all(expected[row["title"]].items() <= row.items() for row in runs)


def test_the_command_gives_the_chosen_contenders_to_the_task_with_rates_and_seeds(tmp_path, monkeypatch):
    class Task:
        tuning_seeds, runs = (7,), []

        def __init__(self, choice, device, quick):
            self.about = {"task": "made up", "data": choice.data, "quick": quick}

        def run(self, contender, rate, seed, tuning):
            self.runs.append((contender.title, rate, seed))
            return {"validation_loss": rate}

    monkeypatch.setitem(lora_variants.TASKS, "spam", Task)
    lora_variants.main([
        "--task", "spam", "--only", "DoRA", "LoRA", "--rates", "0.1", "0.2", "--seeds", "4", "--quick",
        "--output", str(tmp_path / "runs.jsonl"), "--assets", "embedded",
    ])
    assert Task.runs == [
        (title, rate, seed) for title in ("LoRA", "DoRA") for rate, seed in ((0.1, 7), (0.2, 7), (0.1, 4))
    ]
    assert {row["data"] for row in read_rows(tmp_path / "runs.jsonl")} == {"embedded"}


# One layer


def test_fit_layer_brings_the_outputs_nearer():
    torch.manual_seed(0)
    x, layer = torch.randn(20, 6), with_lora(nn.Linear(6, 5).requires_grad_(False), 2, 4)
    wanted = torch.randn(20, 5)
    before = (layer(x) - wanted).square().mean().item()
    assert fit_layer(layer, x, wanted, steps=30) < 0.9 * before


def test_lora_keeps_the_input_for_its_gradient_and_lora_fa_keeps_rank_numbers_per_token():
    x = torch.randn(100, 512, requires_grad=True)
    kept = {
        variant: kept_bytes(with_lora(nn.Linear(512, 64).requires_grad_(False), 4, 4, variant=variant), x)
        for variant in ("lora", "lora-fa")
    }
    assert kept["lora"] == 4 * 100 * (512 + 4)
    assert kept["lora-fa"] == 4 * (100 * 4 + 4 * 64)  # x A and s B


def test_the_first_update_falls_with_the_rank_under_alpha_by_rank_alone():
    sizes = {scaling: first_update(64, scaling) / first_update(1, scaling)
             for scaling in ("alpha", "alpha/sqrt(rank)", "alpha/rank")}
    assert sizes == pytest.approx({"alpha": 1, "alpha/sqrt(rank)": 1, "alpha/rank": 1 / 8}, abs=0.12)


@pytest.mark.parametrize(("variant", "expected"), [
    ("lora", 1_333_264), ("lora-fa", 663_568), ("vera", 83_530),
])
def test_counts_come_with_the_sums_of_their_formulas(variant, expected):
    assert count_in_gpt2_small(variant, 8) == (expected, 83_712, 82_946, 73)


def test_the_ranks_that_adalora_has_left_are_in_the_table_by_block_and_role():
    model = apply_lora(small_gpt(), 3, 3.0, ("query", "mlp"), variant="adalora", target_rank=2)
    optimizer = lora_adamw(model, 0.01, total_steps=6)
    for _ in range(6):
        model(IDS).square().mean().backward()
        optimizer.step()
    table = ranks_by_layer(model)
    assert [*table.columns] == ["query", "MLP in", "MLP out"] and [*table.index] == [1, 2]
    assert table.to_numpy().sum() == 2 * 6
    layer = adapted_layers(model)["trf_blocks.1.ff.layers.2"]
    assert table.loc[2, "MLP out"] == (layer.lora.E != 0).sum()


# Finished runs and tables


def test_only_contenders_with_all_seeds_are_finished():
    rows = make_rows()
    short = [row for row in rows if (row["title"], row["seed"]) != ("VeRA", 5)]
    diverged = [
        row | {"validation_loss": None} if (row["title"], row["seed"]) == ("DoRA", 2) else row for row in rows
    ]
    assert {*finished_runs(rows, task="spam", **ABOUT)["title"]} == {*TITLES}
    assert {*finished_runs(short, task="spam", **ABOUT)["title"]} == {"LoRA", "DoRA"}
    assert {*finished_runs(diverged, task="spam", **ABOUT)["title"]} == {"LoRA", "VeRA"}


def test_other_tasks_models_and_seeds_are_left_out():
    others = [row | change for row in make_rows() for change in (
        {"task": "text"}, {"model": "124M"}, {"quick": True}, {"data": "embedded"})]
    more = [row | {"seed": 6} for row in make_rows() if row["seed"] == 5]
    runs = finished_runs([*others, *more, *make_rows(), *COSTS], task="spam", **ABOUT)
    assert len(runs) == len(make_rows()) and {*runs["seed"]} == {101, *SEEDS}


def test_costs_are_read_per_model_and_need_not_be_there():
    table = tabulate_costs([*make_rows(), *COSTS])
    assert [*table.index] == [("tiny", "LoRA"), ("124M", "LoRA"), ("124M", "LoRA-FA")]
    assert [*table.loc["tiny", "LoRA"]] == ["0.067", "0.050", "71", "80"]
    assert tabulate_costs(make_rows()).empty


def test_results_stand_beside_the_costs_and_gaps_are_empty():
    spam = finished_runs(make_rows(), task="spam", **ABOUT)
    text = finished_runs(make_rows("text", TITLES[:2]), task="text", **ABOUT)
    table = tabulate_results(spam, text, tabulate_costs(COSTS))
    assert [*table.index] == [*TITLES]
    assert table.loc["LoRA", "spam (%)"] == "96.0 ± 3.2" and table.loc["LoRA", "peak (MB)"] == "80"
    losses = text[(text["title"] == "LoRA") & ~text["tuning"].astype(bool)]["test_loss"]
    assert table.loc["LoRA", "perplexity"].startswith(f"{np.exp(losses.astype(float)).mean():.1f}")
    assert table.loc["VeRA", "text (nats)"] == table.loc["DoRA", "s/step"] == ""
    assert "s/step" not in tabulate_results(spam, text, tabulate_costs([]))


# Figures


def test_each_contender_has_a_panel_with_a_ring_at_the_rate_that_was_chosen():
    fig = plot_rates(finished_runs(make_rows(), task="spam", **ABOUT))
    assert find_faults(fig) == []
    axes = [ax for ax in fig.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == [*TITLES]
    for place, ax in enumerate(axes):
        grey, curve, ring = ax.lines
        assert grey.get_ydata()[RATES.index(1e-3)] == 1.0  # LoRA's
        assert ring.get_xdata()[0] == pytest.approx(1e-3 * 10**place) and ring.get_ydata()[0] == 1.0
        assert len(curve.get_xdata()) == len(RATES)


def test_a_rate_at_an_end_of_the_grid_is_noticed():
    assert at_the_edge(finished_runs(make_rows(), task="spam", **ABOUT)) == ["VeRA"]  # 1e-1 is the highest


def test_a_difference_whose_interval_excludes_zero_is_orange():
    spam, text = (finished_runs(make_rows(task), task=task, **ABOUT) for task in ("spam", "text"))
    titles = [each.title for each in RELATIVES]
    fig = plot_differences({"points": (spam, "test", 100), "nats": (text, "test_loss", 1)}, titles)
    assert find_faults(fig) == []
    left, right = fig.axes
    assert [label.get_text() for label in left.get_yticklabels()] == titles
    for ax, expected in ((left, (0, 1, 2)), (right, (0, -0.3, -0.6))):
        for title, mean, color in zip(TITLES, expected, ("blue", "orange", "orange")):
            bar = ax.containers[TITLES.index(title)][0]
            assert bar.get_xdata()[0] == pytest.approx(mean) and bar.get_ydata()[0] == titles.index(title)
            assert to_hex(bar.get_color()) == PALETTE[color].lower()


def test_all_relatives_fit_into_both_figures():
    titles = [each.title for each in RELATIVES]
    rows = [row for title in titles for row in make_rows(titles=(title,))]
    spam = finished_runs(rows, task="spam", **ABOUT)
    assert find_faults(plot_rates(spam)) == []
    panels = {"one": (spam, "test", 100), "two": (spam, "test", 1)}
    assert find_faults(plot_differences(panels, titles)) == []


def test_the_figures_of_single_methods_are_legible_and_show_what_they_are_given():
    sizes = {name: {1: 2.0, 2: size, 4: size} for name, size in (("alpha", 2.0), ("alpha/rank", 1.0))}
    updates = plot_first_updates(sizes)
    assert [list(line.get_ydata()) for line in updates.axes[0].lines] == [[1, 1, 1], [1, 0.5, 0.5]]
    budget = Budget(first=120, last=40, total_steps=100, warmup=10, final=30)
    falling = plot_budget(budget)
    assert list(falling.axes[0].lines[0].get_ydata())[::99] == [120, 40]
    values = plot_singular_values(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    assert [bar.get_height() for bar in values.axes[0].patches] == [3, 2, 1]
    table = ranks_by_layer(apply_lora(small_gpt(), 4, 1.0, "query", variant="adalora"))
    left = plot_ranks_left(table, 4)
    assert [text.get_text() for text in drawn_texts(left)].count("0") >= 2  # E starts at zero
    assert [fault for fig in (updates, falling, values, left) for fault in find_faults(fig)] == []
