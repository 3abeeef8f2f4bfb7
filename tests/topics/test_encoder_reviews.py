"""Recipes and command line of the encoder's reviews: which layers, the grid, finished runs, figures."""

import json
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import transformers as hf

from appendix_e import count_parameters
from comparison.grid import read_rows
from figures import find_faults
from lora.layers import adapted_layers
from lora.targets import ROLES
from models import foreign, same_state, state
from topics import encoder_reviews
from topics.encoder_reviews import (
    RECIPES,
    RESULTS,
    Recipe,
    all_recipes,
    main,
    name_recipe,
    parse_command_line,
    parse_part,
    plot_grid,
    plot_margins,
    plot_runs,
    plot_token_counts,
    tabulate_runs,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# Recipes


def layers_of(roles, blocks=2):
    """Return the names of foreign("bert")'s layers that have these roles."""
    names = {"classifier"} if "head" in roles else set()
    for block in range(blocks):
        path = f"bert.encoder.layer.{block}"
        for role in {*roles} & {"query", "key", "value"}:
            names.add(f"{path}.attention.self.{role}")
        if "projection" in roles:
            names.add(f"{path}.attention.output.dense")
        if "mlp" in roles:
            names |= {f"{path}.intermediate.dense", f"{path}.output.dense"}
    return names


@pytest.mark.parametrize("flags", [flags for flags in product((False, True), repeat=6) if any(flags)])
def test_every_combination_of_roles_chooses_its_layers_and_no_others(flags):
    roles = tuple(role for role, chosen in zip(ROLES, flags) if chosen)
    model = Recipe("", roles=roles, rank=2).adapt(foreign("bert"))
    assert {*adapted_layers(model)} == layers_of(roles)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora.{part}" for layer in layers_of(roles) for part in "AB"
    }


@pytest.mark.parametrize("recipe, trained", [
    (RECIPES[0], 147_456), (RECIPES[1], 592_130), (RECIPES[2], 516_096), (RECIPES[3], 66_955_010),
])
def test_the_four_runs_train_as_many_parameters_of_distilbert_as_published(recipe, trained):
    with torch.device("meta"):
        model = hf.DistilBertForSequenceClassification(hf.DistilBertConfig())
    assert count_parameters(recipe.adapt(model))[0] == trained


def test_lora_starts_as_the_base_model_with_a_normal_of_variance_one_over_the_rank():
    model = foreign("bert")
    ids = torch.randint(0, 60, (2, 5))
    before = model(ids).logits
    torch.manual_seed(1)
    Recipe("", roles=tuple(ROLES), rank=16).adapt(model)
    assert torch.equal(model(ids).logits, before)
    drawn = torch.cat([layer.lora.A.flatten() for layer in adapted_layers(model).values()])
    assert abs(drawn.std() * 4 - 1) < 0.1 and drawn.abs().max() > 2 / 4  # no uniform draw within ±1/√r


def test_alpha_is_the_scale_itself():
    model = Recipe("", rank=4, alpha=16.0).adapt(foreign("bert"))
    assert {layer.lora.scale for layer in adapted_layers(model).values()} == {16.0}


def test_the_head_trains_only_if_asked():
    frozen, trained = (Recipe("", train_head=flag).adapt(foreign("bert")) for flag in (False, True))
    assert not frozen.classifier.weight.requires_grad
    assert trained.classifier.weight.requires_grad and trained.classifier.bias.requires_grad


def test_the_grid_has_the_576_settings_of_the_original_each_once():
    recipes = all_recipes()
    assert len(recipes) == len({recipe.title for recipe in recipes}) == 6 * 6 * 16 == 576
    assert all({"query", "value"} <= {*recipe.roles} for recipe in recipes)
    assert {recipe.alpha for recipe in recipes} == {1, 4, 8, 16, 32, 64}
    assert {recipe.rank for recipe in recipes} == {1, 2, 4, 8, 16, 32}
    assert {RECIPES[0], RECIPES[2]} <= {*recipes}  # default and best are among them


def test_titles_say_what_differs():
    assert name_recipe(Recipe("")).title == "default"
    assert name_recipe(Recipe("", trains="all")).title == "all weights"
    one = Recipe("", roles=("key",), rank=2, alpha=0.5, scaling="alpha/rank", train_head=True)
    assert name_recipe(one).title == "key, r 2, α 0.5, alpha/rank, head trained"


# Command line


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "a/3", "1/b", "1/0", "-1/3"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(Exception, match="is no part: 1/8 is the first of eight"):
        parse_part(text)


def test_the_parts_of_a_grid_are_the_grid():
    parts = [
        encoder_reviews.chosen_recipes(parse_command_line(["grid", "--part", f"{part}/7"]))
        for part in range(1, 8)
    ]
    assert {recipe for part in parts for recipe in part} == {*all_recipes()} and sum(map(len, parts)) == 576


@pytest.mark.parametrize("flags, expected", [
    ([], Recipe("default")),
    (["--lora-mlp", "--lora-alpha", "1"], Recipe("best", roles=("query", "value", "mlp"), alpha=1.0)),
    (["--trains", "last"], Recipe("last two layers", trains="last")),
    (["--no-lora-query", "--no-lora-value", "--lora-head", "--lora-rank", "2"],
     Recipe("head, r 2, α 16", roles=("head",), rank=2)),
])
def test_the_flags_choose_the_recipe(flags, expected):
    assert encoder_reviews.chosen_recipes(parse_command_line(["run", *flags])) == [expected]


def run(capsys, *arguments):
    """Run the command with few reviews; return (exit code, standard output, standard error)."""
    few = ["--train-reviews", "12", "--validation-reviews", "6", "--test-reviews", "6", "--epochs", "1",
           "--max-length", "12", "--assets", "embedded"]
    code = 0
    try:
        main([arguments[0], *few, *map(str, arguments[1:])])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_finished_runs_are_kept_and_not_repeated(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    code, printed, _ = run(capsys, "run", "--trains", "last", "--seeds", 1, 2, "--output", file)
    rows = read_rows(file)
    assert code == 0 and [row["seed"] for row in rows] == [1, 2] and "last two layers" in printed
    before = file.read_bytes()
    assert run(capsys, "run", "--trains", "last", "--seeds", 1, 2, "--output", file)[0] == 0
    assert file.read_bytes() == before
    file.write_bytes(before[:-20])  # as a killed process leaves it
    assert run(capsys, "run", "--trains", "last", "--seeds", 1, 2, "--output", file)[0] == 0
    again = read_rows(file)
    assert [row["seed"] for row in again] == [1, 2] and again[0] == rows[0]


def test_a_part_of_the_grid_runs_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    arguments = ("--alphas", 1, "--ranks", 1, 2, "--part", "32/32", "--output", file)
    assert run(capsys, "grid", *arguments)[0] == 0
    (row,) = read_rows(file)
    assert row["rank"] == 2 and {*row["roles"]} == {*ROLES}


@pytest.mark.parametrize("arguments, words", [
    (("run", "--no-lora-query", "--no-lora-value"), "at least one role"),
    (("run", "--lora-rank", 0), "at least 1"),
    (("run", "--lora-alpha", "nan"), "finite"),
    (("run", "--max-length", 2), "at least 3"),
    (("run", "--train-reviews", 10**6), "take fewer"),
    (("run", "--learning-rate", 0), "learning_rate"),
    (("run", "--output", "."), "folder"),
])
def test_a_users_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, _ = run(capsys, *arguments)
    assert isinstance(code, str) and code.startswith("error: ") and words in code and "\n" not in code


# Tables and figures


def made_up(titles=("default", "best"), seeds=(1, 2, 3)):
    return [
        {"title": title, "seed": seed, "rate": 5e-5, "trained": 1000, "tuning": False,
         "counts": {"test": 400}, "validation": 0.9, "test": 0.8 + 0.01 * seed + 0.05 * place}
        for place, title in enumerate(titles) for seed in seeds
    ]


def test_the_table_has_means_and_both_intervals():
    table = tabulate_runs(made_up())
    assert [*table.index] == ["default", "best"]
    row = table.loc["default"]
    assert row["test (%)"] == "82.00" and row["seeds"] == 3
    assert row["± (seeds)"] == "2.48"  # 4.303 · 1 / √3
    assert row["95 % (reviews)"] == "77.9 to 85.5"  # Wilson's for 328 of 400
    single = tabulate_runs(made_up(seeds=(1,)))
    assert "± (seeds)" not in single or not single["± (seeds)"].any()


def test_every_seed_is_a_dot_and_published_figures_are_diamonds():
    figure = plot_runs(made_up(), {"best": 92.39})
    dots, mean, *_ = figure.axes[0].lines
    np.testing.assert_allclose(dots.get_xdata(), [81, 82, 83])
    assert mean.get_xdata()[0] == pytest.approx(82)
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in diamonds] == [92.39]
    assert find_faults(figure) == []


def test_the_grid_shows_each_setting_in_its_place():
    rows = [
        {"rank": rank, "alpha": alpha, "validation": (rank + alpha) / 100}
        for rank in (1, 4) for alpha in (1.0, 16.0, 64.0)
    ]
    figure = plot_grid(rows)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["2.0", "17.0", "65.0", "5.0", "20.0", "68.0"]
    assert find_faults(figure) == []


def test_reviews_above_the_limit_are_counted_as_cut():
    figure = plot_token_counts(np.array([10, 20, 30, 300]), 256)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["read whole (75%)", "cut (25%)"] and find_faults(figure) == []
    assert len(plot_token_counts(np.array([10, 20]), 256).axes[0].get_legend().get_texts()) == 1


def test_margins_have_a_panel_each():
    margins = {"before": np.array([-0.1, 0, 0, 0.1]), "after": np.array([-1.0, -2, 1, 2])}
    figure = plot_margins(margins, [0, 0, 1, 1])
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"] and find_faults(figure) == []


# The stored results


@pytest.fixture(scope="module")
def stored():
    return read_rows(RESULTS)


def test_every_stored_run_is_a_recipe_of_the_module(stored):
    known = {recipe.title: json.loads(json.dumps(vars(recipe))) for recipe in RECIPES}
    runs = [row for row in stored if row["task"] == "reviews"]
    assert runs
    for row in runs:
        title = row["title"]
        assert title in known, title
        assert known[title].items() <= row.items()


def test_the_stored_runs_on_imdb_have_three_seeds_of_the_four_runs_and_minilms_counts(stored):
    runs = [row for row in stored if row["task"] == "reviews" and row["data"] == "book"]
    trained = {"default": 73_728, "last two layers": 148_610, "best": 258_048, "all weights": 22_713_986}
    for title, count in trained.items():
        mine = [row for row in runs if row["title"] == title]
        assert {row["seed"] for row in mine} == {1, 2, 3} and {row["trained"] for row in mine} == {count}
        assert {row["rate"] for row in mine} == {5e-5} and {row["max_length"] for row in mine} == {256}


def test_a_refused_recipe_leaves_the_model_alone():
    model = foreign("bert")
    before = state(model)
    with pytest.raises(ValueError, match="rank"):
        Recipe("", rank=0).adapt(model)
    assert same_state(model, before)
