"""Going on in the style of film reviews: all weights compared with LoRA, and what a step of each costs.

The settings are those of Keras' example "GPT2 Text Generation with KerasHub" and its LoRA twin as far as
they fit a CPU: windows of 128 tokens, AdamW with weight decay 0.01 on matrices alone, gradients clipped to
norm 1.
"""

import json
from dataclasses import asdict, dataclass, replace
from statistics import fmean

import pandas as pd
import torch

from appendix_e import count_parameters
from book_assets.files import append_line, check_outputs
from ch04 import GPTModel, use_fused_attention
from comparison.costs import SHAPES
from comparison.grid import SEEDS, best_rate, find_or_run, finished_runs, read_rows, run_grid
from comparison.tasks import TEXT_TOKENS, TextTask
from film_reviews.reviews import load_short_reviews, load_texts
from language_model.training import TextSettings, adamw_on_matrices, fit_text, perplexity
from lora.layers import apply_lora
from spam_classifier.experiments import mean_and_spread, peak_of_step

STYLE_SETTINGS = TextSettings(steps=150, batch_size=4, learning_rate=1e-3, progress=False)
STYLE_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
KERAS_EXAMPLE = {  # published: one epoch of 500 batches of 32 texts on a T4; seconds are those of a step
    "full": {"trained": 124_439_808, "seconds": 0.632, "train_loss": 3.2987},
    "LoRA": {"trained": 147_456, "seconds": 0.505, "train_loss": 3.5401},
}
FEW = 30  # reviews of each part in a quick run


class StyleTask(TextTask):
    """Going on in the style of film reviews: short ones of our own, or IMDb's.

    `texts`, {"train", "validation", "test": texts}, are taken instead of reviews if given.
    """

    name, targets = "style", ("query", "value")

    def __init__(self, choice, device, settings=STYLE_SETTINGS, quick=False, texts=None):
        self.texts = texts
        super().__init__(choice, device, settings, quick)

    def load_parts(self, choice, quick):
        """Return {"train", "validation", "test": texts}."""
        if self.texts is None:
            self.texts = load_style(choice)
        return {name: part[:FEW] if quick else part for name, part in self.texts.items()}

    def make_optimizer(self, model, learning_rate, **options):
        """Return AdamW that decays matrices alone."""
        return adamw_on_matrices(model, learning_rate, **options)

    def describe(self, history):
        """Return what `TextTask.describe` does, and the mean loss of all steps, as Keras reports it."""
        return {**super().describe(history), "train_loss": fmean(history.losses)}


def load_style(choice):
    """Return {"train", "validation", "test": texts}: with choice.data "embedded" the 1,500 short reviews.

    With "book" they are reviews of IMDb, as `load_texts` draws them. Raises what the two loaders raise.
    """
    if choice.data == "embedded":
        return {name: part["Text"].tolist() for name, part in load_short_reviews().items()}
    return load_texts(choice)


@dataclass(frozen=True)
class Approach:
    """A way to fine-tune a GPT: "full", all weights, or "lora" with the paper's start and alpha / rank."""

    title: str
    method: str = "lora"
    rank: int = 4
    alpha: float = 32.0

    def adapt(self, model, targets=("query", "value"), train_in_full=()):
        """Choose what trains in `model`, or put LoRA into its layers `targets`, in place; return it."""
        if self.method == "full":
            return model.requires_grad_(True)
        return apply_lora(
            model, self.rank, self.alpha, targets, "alpha/rank", init="paper",
            train_in_full=train_in_full,
        )


APPROACHES = (Approach("full", "full"), Approach("LoRA"))


# Comparison


def compare_approaches(task, output, rates=STYLE_RATES, seeds=SEEDS, report=print):
    """Return the runs, a DataFrame, of both approaches at their own best rate and at the other's.

    `task` is a `StyleTask`. The rates come from `run_grid`; see there for the file `output`.
    """
    runs = run_grid(task, APPROACHES, output, rates, seeds, report)
    chosen = {each.title: own_rate(runs, each.title) for each in APPROACHES}
    swapped = [
        find_or_run(
            task, at_the_others_rate(each, other), output, report, chosen[other.title], seed, tuning=False
        )
        for each, other in (APPROACHES, APPROACHES[::-1]) for seed in seeds
    ]
    return pd.concat([runs, pd.DataFrame(swapped)], ignore_index=True)


def own_rate(runs, title):
    """Return the learning rate with the lowest validation loss among the tuning runs of `title`."""
    tuning = runs[runs["tuning"].astype(bool) & (runs["title"] == title)]
    return best_rate(tuning.to_dict("records"))


def at_the_others_rate(approach, other):
    """Return `approach` with a title of its own, for the runs at the rate of `other`."""
    return replace(approach, title=f"{approach.title} at {other.title}'s rate")


def stored_runs(choice, path, seeds=SEEDS):
    """Return the complete approaches of the file `path` for these assets and STYLE_SETTINGS.

    It is a DataFrame like that of `finished_runs`. An approach without all `seeds` is left out; without any
    approach it is empty.
    """
    about = {
        "task": StyleTask.name, "model": choice.model_size(), "data": choice.data, "quick": False,
        "steps": STYLE_SETTINGS.steps, "batch_size": STYLE_SETTINGS.batch_size,
    }
    return finished_runs(read_rows(path), seeds, **about)


def tabulate_styles(runs):
    """Return a DataFrame of texts, a row per approach: rate, trained, losses, held-out perplexity.

    `runs` are those of `stored_runs`. Losses are in nats per token; the training loss is the mean of all
    steps. ± is one standard deviation of the seeds. It has no rows for no runs.
    """
    if runs.empty:
        return pd.DataFrame()
    table = {}
    for title, group in runs[~runs["tuning"].astype(bool)].groupby("title", sort=False):
        table[title] = {
            "rate": f"{group['rate'].iloc[0]:g}", "trained": f"{group['trained'].iloc[0]:,}",
            "train loss": f"{group['train_loss'].mean():.3f}",
            "test loss": mean_and_spread(group["test_loss"], digits=3),
            "perplexity": mean_and_spread(group["test_loss"].map(perplexity)),
        }
    return pd.DataFrame(table).T


# Costs


def run_style_costs(contenders, output, device, model="tiny", steps=3, report=print):
    """Measure a step of every contender at the shape `model`, a key of SHAPES; return the rows.

    They are added to the file `output`; what the file has already is not measured again. Run it with
    nothing else running. Memory on a CPU is counted tensor by tensor, so it is the same everywhere.
    """
    check_outputs(output)
    rows = []
    for each in contenders:
        key = {"task": "style costs", "model": model, "device": device.type, **asdict(each)}
        row = next((row for row in read_rows(output) if key.items() <= row.items()), None)
        if row is None:
            numbers = measure_style_step(each, SHAPES[model], device, steps)
            row = {**key, "threads": torch.get_num_threads(), **numbers}
            append_line(output, json.dumps(row))
            report(f"{model}, {each.title}: {row['seconds_per_step']:.3f} s per step")
        rows.append(row)
    return rows


def measure_style_step(contender, config, device, steps=3, settings=STYLE_SETTINGS):
    """Return trained, tokens, seconds_per_step and step_memory_bytes at the shape `config`.

    The weights and tokens are random; embeddings start as small as GPT-2's did, since larger ones make most
    probabilities, and so gradients, denormal numbers, with which processors are slow. Time is the mean of
    `steps` steps after one to warm up; memory is the peak of two, since AdamW's state only exists after the
    first.
    """
    torch.manual_seed(settings.seed)
    model = GPTModel(config)
    torch.nn.init.normal_(model.tok_emb.weight, std=0.02)
    model.out_head.weight = model.tok_emb.weight
    use_fused_attention(model)
    contender.adapt(model, StyleTask.targets, ()).to(device)
    windows = torch.randint(config["vocab_size"], (2 * settings.batch_size, TEXT_TOKENS + 1))

    def take_steps(count):
        some = replace(settings, steps=count)
        return fit_text(model, windows, some, device, make_optimizer=adamw_on_matrices).seconds / count

    take_steps(1)
    return {
        "trained": count_parameters(model)[0], "tokens": settings.batch_size * TEXT_TOKENS,
        "seconds_per_step": take_steps(steps),
        "step_memory_bytes": peak_of_step(model, lambda: take_steps(2), device),
    }


def tabulate_style_costs(rows):
    """Return a DataFrame of texts, a row per model and approach: trained, s/step, peak memory of a step.

    `rows` are those of a results file; those of `run_style_costs` count. The last rows are Keras' example.
    """
    table = {}
    for row in (row for row in rows if row.get("task") == "style costs"):
        table[row["model"], row["title"]] = {
            "trained": f"{row['trained']:,}", "s/step": f"{row['seconds_per_step']:.3f}",
            "peak (MB)": f"{row['step_memory_bytes'] / 1e6:,.0f}" if row["step_memory_bytes"] else "",
        }
    for title, row in KERAS_EXAMPLE.items():
        table["Keras' example, T4", title] = {
            "trained": f"{row['trained']:,}", "s/step": f"{row['seconds']:.3f}", "peak (MB)": "",
        }
    return pd.DataFrame(table).T
