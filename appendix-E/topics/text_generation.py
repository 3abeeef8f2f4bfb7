"""GPT-2 fine-tuned to go on in the style of a text, in full or with LoRA: commands, tables, figures.

    python appendix-E/topics/text_generation.py finetune --assets embedded --text letters.txt --output mine
    python appendix-E/topics/text_generation.py generate --adapter mine --prompt "Dear Emma,"

`compare` trains both methods with a grid of learning rates, and then each also with the other's rate. A
finished run is a line of JSON in the file `--output`; none is repeated. The experiment is that of Keras'
example "Parameter-efficient fine-tuning of GPT-2 with LoRA" (2023).
"""

import argparse
import inspect
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

try:
    from book_assets.command_line import add_assets_flag, command, read_lines
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from book_assets import choose_assets, get_tokenizer
from book_assets.files import check_outputs
from book_figures import PALETTE
from ch04 import pick_device
from comparison.costs import SHAPES
from comparison.grid import SEEDS, at_the_edge, read_rows
from comparison.styles import (
    APPROACHES,
    STYLE_RATES,
    STYLE_SETTINGS,
    Approach,
    StyleTask,
    compare_approaches,
    own_rate,
    run_style_costs,
    tabulate_style_costs,
    tabulate_styles,
)
from fast_path.settings import HelpFormatter, add_flags, check_count, take_flags
from film_reviews.reviews import cut_story
from language_model.generation import check_decoding, likely_tokens, stream_text, stream_tokens
from language_model.saved import FULL_FILE, check_folder, load_finetuned, save_finetuned
from language_model.training import load_language_model, mean_loss, perplexity
from lora.files import WEIGHTS_FILE
from lora.layers import adapted_layers, merge_lora, print_parameters

STYLE_RESULTS = Path(__file__).with_name("text-generation.jsonl")
OWN_RATES = {"full": 3e-4, "lora": 3e-3}  # where the command line names none
COLORS = {"full": "orange", "LoRA": "blue"}


def measure_speed(model, count=30, repeats=3):
    """Return how many tokens per second `model` writes with the cache, the best of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in stream_tokens(model, [0], count, temperature=0):
            pass
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


# Figures


def plot_training(histories, window=10):
    """Return a Figure of training and validation losses over the steps, for {title: `TextHistory`}.

    Lines are training losses, each point the mean of the last `window` steps; dots are validation losses.
    """
    fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    for title, history in histories.items():
        color = PALETTE[COLORS[title]]
        means = pd.Series(history.losses).rolling(window, min_periods=1).mean()
        ax.plot(means.index + 1, means, color=color, label=f"{title}, training")
        ax.plot([*history.validation], [*history.validation.values()], "o", color=color,
                label=f"{title}, validation")
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    ax.legend()
    return fig


def plot_style_rates(runs):
    """Return a Figure of the validation loss over the learning rate, a curve per approach.

    A ring marks the rate that was chosen; rates with which the training diverged have no point.
    """
    fig, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    tuning = runs[runs["tuning"].astype(bool)]
    for title, group in tuning.groupby("title", sort=False):
        losses = pd.to_numeric(group["validation_loss"]).groupby(group["rate"]).mean().dropna()
        color, chosen = PALETTE[COLORS[title]], own_rate(runs, title)
        ax.plot(losses.index, losses, "o-", color=color, label=title)
        ax.plot(chosen, losses[chosen], "o", mfc="none", mec=PALETTE["ink"], ms=12, mew=1.5)
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
    ax.legend()
    return fig


def plot_decoding(logits, tokenizer, panels, count=12):
    """Return a Figure: the probabilities of the `count` likeliest next tokens, one panel per way to draw.

    `logits` are (V,), `panels` {title: options of `likely_tokens`}. Tokens that cannot be drawn are grey,
    with the probability that the temperature alone gives them; the title says how many can.
    """
    top = logits.topk(count).indices.tolist()
    names = [repr(tokenizer.decode([token]))[1:-1].replace(" ", "␣") for token in top]
    fig, axes = plt.subplots(
        1, len(panels), figsize=(8, 0.26 * count + 0.9), sharey=True, sharex=True, layout="constrained",
        squeeze=False)
    for ax, (title, options) in zip(axes[0], panels.items()):
        drawable = likely_tokens(logits, **options)
        kept = drawable[top].numpy()
        warmed = likely_tokens(logits, options.get("temperature", 1.0))[top].numpy()
        for values, drawn, color in ((warmed, kept == 0, "grey"), (kept, kept > 0, "blue")):
            rows = np.flatnonzero(drawn)
            ax.barh(rows, values[rows], color=PALETTE[color], height=0.75)
        ax.set(title=f"{title}\n{int((drawable > 0).sum()):,} tokens", xlabel="probability")
        ax.set(xscale="log", xlim=(1e-3, 1))
    axes[0, 0].set_yticks(range(count), names)
    axes[0, 0].invert_yaxis()
    return fig


# Commands


def read_text_parts(path):
    """Return {"train", "validation", "test": [text]} of the UTF-8 file `path`, 80, 10 and 10 % of it.

    It is cut between paragraphs, which are separated by empty lines. Raises OSError if it cannot be read,
    ValueError if it is not UTF-8 or has fewer than ten paragraphs.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert it first") from error
    text = re.sub(r"\n[^\S\n]*(\n[^\S\n]*)*\n", "\n\n", text)
    count = len(text.strip().split("\n\n"))
    if count < 10:
        raise ValueError(
            f"{path} has {count} paragraphs, separated by empty lines: at least 10 are needed, for training, "
            "validation and test"
        )
    return cut_story(text)


def text_finetune(output, method, rank, alpha, learning_rate=None, text=None, assets=None, **options):
    """Fine-tune GPT-2 on a text, print its losses, save the adapter or all weights.

    Without --text it is trained on film reviews. The text is cut between paragraphs: 80 % to train on, 10 %
    for validation, 10 % for the test at the end.
    """
    file = FULL_FILE if method == "full" else WEIGHTS_FILE
    check_folder(output, file)
    check_outputs(Path(output, file))
    check_count("rank", rank)
    options["learning_rate"] = OWN_RATES[method] if learning_rate is None else learning_rate
    settings = take_flags(replace(STYLE_SETTINGS, progress=sys.stderr.isatty()), options)
    choice, device = assets or choose_assets("book"), pick_device()
    print(choice)
    task = StyleTask(choice, device, settings, texts=read_text_parts(text) if text else None)
    print({name: f"{len(windows)} windows of {task.about['tokens']} tokens"
           for name, windows in task.windows.items()})
    approach = Approach(method, method, rank, alpha)
    model, history = task.train(
        approach, settings.learning_rate, settings.seed, validation=task.windows["validation"]
    )
    print_parameters(model)
    _, config = load_language_model(task.size)
    notes = {"assets": asdict(choice), "settings": asdict(settings), **asdict(approach)}
    folder = save_finetuned(model, output, task.size, config, notes)
    for step, loss in history.validation.items():
        print(f"after {step:>4} steps: validation loss {loss:.3f}, perplexity {perplexity(loss):.1f}")
    loss = mean_loss(model, task.windows["test"], device)
    print(f"test loss {loss:.3f}, perplexity {perplexity(loss):.1f}")
    print(f"{history.seconds:.0f} s of training; written to {folder}")


def text_generate(max_new_tokens, adapter=None, prompt=(), assets=None, **sampling):
    """Continue each prompt, and print the text as it comes.

    --adapter is a folder that finetune has written, with an adapter or with all weights; without it the base
    model writes.
    """
    check_decoding(max_new_tokens, **{"top_k": None, **sampling})
    prompts = [*prompt] or [line for line in read_lines() if line.strip()]
    if not prompts:
        raise ValueError("there is no prompt: give --prompt, or one per line on standard input")
    model, tokenizer = load_writer(adapter, assets or choose_assets("book"), pick_device()), get_tokenizer()
    for number, text in enumerate(prompts):
        print("\n" * (number > 0) + text, end="", flush=True)
        for piece in stream_text(model, tokenizer, text, max_new_tokens, **sampling):
            print(piece, end="", flush=True)
        print()


def load_writer(folder, choice, device):
    """Return the fine-tuned model in `folder`, LoRA merged; without one the base model."""
    if folder is None:
        return load_language_model(choice.model_size())[0].to(device).eval()
    model, _ = load_finetuned(folder, device)
    return merge_lora(model) if adapted_layers(model) else model


def text_compare(output, rates, seeds, quick, assets=None, **options):
    """Train both approaches with every rate and seed, except the runs that the file has; print the table."""
    check_outputs(output)
    choice, settings = assets or choose_assets("embedded"), take_flags(STYLE_SETTINGS, options)
    task = StyleTask(choice, pick_device(), settings, quick)
    runs = compare_approaches(task, output, rates, seeds, lambda line: print(line, flush=True))
    print("", tabulate_styles(runs).to_string(), "", f"Written: {output}", sep="\n")
    for title in at_the_edge(runs):
        print(f"{title}: the best rate is at the edge of the grid, try further ones with --rates")


def text_costs(output, model):
    """Measure seconds and peak memory of a training step of both approaches."""
    run_style_costs(APPROACHES, output, pick_device(), model)
    print(tabulate_style_costs(read_rows(output)).to_string())


def build_command_line():
    """Return the argparse parser of the four commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    subs = {}
    for function in (text_finetune, text_generate, text_compare, text_costs):
        name, text = function.__name__.removeprefix("text_"), inspect.getdoc(function)
        subs[name] = commands.add_parser(
            name, help=text.partition("\n")[0], description=text, formatter_class=HelpFormatter)
        subs[name].set_defaults(function=function)
    add_finetune_flags(subs["finetune"])
    add_generate_flags(subs["generate"])
    add_compare_flags(subs["compare"])
    costs = subs["costs"]
    costs.add_argument("--model", choices=SHAPES, default="tiny", help="shape, with random weights")
    costs.add_argument("--output", type=Path, default=Path(STYLE_RESULTS.name), help="file of measurements")
    return parser


def add_finetune_flags(parser):
    default = Approach("")
    add_assets_flag(parser)
    parser.add_argument("--text", type=Path, default=argparse.SUPPRESS,
                        help="UTF-8, any text with at least ten paragraphs (default: film reviews)")
    parser.add_argument("--method", choices=("full", "lora"), default="lora", help="what trains")
    parser.add_argument("--rank", type=int, default=default.rank, help="columns of LoRA's A")
    parser.add_argument("--alpha", type=float, default=default.alpha, help="LoRA's scale is alpha / rank")
    rates = " and ".join(f"{rate:g} for {method}" for method, rate in OWN_RATES.items())
    parser.add_argument(
        "--learning-rate", type=float, default=argparse.SUPPRESS, help=f"AdamW's (default: {rates})")
    add_flags(parser, STYLE_SETTINGS, ("steps", "batch_size", "seed", "warmup", "precision", "eval_every"))
    parser.add_argument("--output", type=Path, default=Path("style"), help="folder to write")


def add_generate_flags(parser):
    add_assets_flag(parser)
    for names, options in (
        (("--adapter",), {"type": Path, "help": "folder that finetune has written"}),
        (("--prompt",), {"nargs": "+", "help": "texts; without any, each line of standard input is one"}),
        (("--top-k",), {"type": int, "help": "draw from so many of the likeliest tokens"}),
    ):
        parser.add_argument(*names, default=argparse.SUPPRESS, **options)
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=100, help="most tokens for a prompt")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--top-p", type=float, default=0.95, help="draw from the likeliest tokens that reach it together")
    add("--seed", type=int, default=123, help="random seed, for each prompt anew")


def add_compare_flags(parser):
    add_assets_flag(parser, default="embedded")
    parser.add_argument("--rates", type=float, nargs="+", default=STYLE_RATES, help="grid of learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the comparison")
    parser.add_argument("--quick", action="store_true", help="a few reviews")
    add_flags(parser, STYLE_SETTINGS, ("steps", "batch_size"))
    parser.add_argument("--output", type=Path, default=Path(STYLE_RESULTS.name), help="file of finished runs")


@command
def main(arguments=None):
    """Run one command, see --help."""
    options = vars(build_command_line().parse_args(arguments))
    options.pop("function")(**options)


if __name__ == "__main__":
    main()
