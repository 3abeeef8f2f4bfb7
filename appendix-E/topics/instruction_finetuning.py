"""Chapter 7's task with LoRA: a GPT-2 that answers instructions.

    python appendix-E/topics/instruction_finetuning.py finetune --assets embedded --output instructions
    python appendix-E/topics/instruction_finetuning.py ask --adapter instructions "Say hello to Mary."
    python appendix-E/topics/instruction_finetuning.py compare --assets embedded

`finetune` writes the adapter (or, with --method full, the model), results.json and answers.json into the
folder `--output`. `compare` trains every approach; a finished run is a line of JSON in its file, and none
is repeated.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

try:
    from book_assets.command_line import add_assets_flag, command
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from appendix_e import count_parameters, freeze
from book_assets import choose_assets, get_tokenizer
from book_assets.files import check_outputs, write_whole
from book_figures import PALETTE
from ch04 import pick_device
from comparison.grid import RATES, SEEDS, find_or_run, run_grid
from comparison.instructions import InstructionTask
from fast_path.settings import HelpFormatter, add_flags, check_count, take_flags
from instructions.data import check_entries
from instructions.scores import answer, score_answers
from instructions.training import InstructionSettings
from language_model.saved import FULL_FILE, check_folder, load_finetuned, save_finetuned
from lora.files import WEIGHTS_FILE
from lora.layers import apply_lora, print_parameters

INSTRUCTION_RUNS = Path(__file__).with_name("instruction-finetuning.jsonl")
RESULTS_FILE, ANSWERS_FILE = "results.json", "answers.json"
TUNING_FLAGS = ("epochs", "learning_rate", "batch_size", "seed", "weight_decay", "precision", "mask_prompt")


# What trains


@dataclass(frozen=True)
class InstructionApproach:
    """What trains: "lora" in all linear layers, "full", all weights, or "none"; and on which tokens.

    - `rank`, `alpha`: LoRA's; alpha is the scale itself, as printed
    - `mask_prompt`: learn the answers alone, not the prompts
    """

    title: str
    method: str = "lora"
    mask_prompt: bool = False
    rank: int = 16
    alpha: float = 16.0

    def adapt(self, model):
        """Freeze `model`, put in or choose what trains, and return it."""
        if self.method == "lora":
            return apply_lora(model, self.rank, self.alpha, "all")
        freeze(model)
        return model.requires_grad_(self.method == "full")


SCALE = 4.0  # gpt2-tiny learns faster than with 1 or 16, each with its own rate
BASE = InstructionApproach("base model", method="none")
INSTRUCTION_APPROACHES = (
    InstructionApproach("LoRA", alpha=SCALE),
    InstructionApproach("LoRA, prompt masked", mask_prompt=True, alpha=SCALE),
    InstructionApproach("all weights", method="full"),
    InstructionApproach("all weights, prompt masked", method="full", mask_prompt=True),
)


def pair_answers(entries, answers):
    """Return the entries, each with the model's answer, to be written as JSON."""
    return [{**entry, "answer": said} for entry, said in zip(entries, answers, strict=True)]


# Tables and figures


def show_answers(entries, columns, count=8):
    """Return a DataFrame of `count` entries, in the order of their tasks.

    Its columns are instruction, input, the right answer and those of {title: answers}; the index is the task.
    """
    order = sorted(range(len(entries)), key=lambda n: entries[n].get("task", ""))
    chosen = [order[n] for n in np.linspace(0, len(entries) - 1, count).round().astype(int)]
    rows = [
        {
            "instruction": entries[n]["instruction"], "input": entries[n]["input"],
            "right": entries[n]["output"], **{title: answers[n] for title, answers in columns.items()},
        }
        for n in chosen
    ]
    return pd.DataFrame(rows, index=[entries[n].get("task", "") for n in chosen])


def tabulate_scores(entries, columns):
    """Return a DataFrame, a row per task: the exact matches in % of {title: answers}, and F1 over all."""
    tables = {title: score_answers(entries, answers) for title, answers in columns.items()}
    exact = pd.DataFrame({title: 100 * table["exact"] for title, table in tables.items()})
    exact.loc["F1, all"] = {title: 100 * table.loc["all", "f1"] for title, table in tables.items()}
    return exact.round(1)


def final_runs(rows):
    """Return {title: DataFrame} of those finished runs that did not only serve to choose a rate."""
    final = pd.DataFrame([row for row in rows if not row["tuning"] and row["validation_loss"] is not None])
    return dict([*final.groupby("title", sort=False)]) if len(final) else {}


def tabulate_comparison(rows):
    """Return a DataFrame of texts, a row per approach: rate, trained, scores in % and losses, mean ± spread.

    The spread is one standard deviation of the seeds; of a single run there is none.
    """
    table = {}
    for title, runs in final_runs(rows).items():
        row = table[title] = {"rate": f"{runs['rate'].iloc[0]:g}", "trained": f"{runs['trained'].iloc[0]:,}"}
        for column, factor, name, digits in (
            ("test", 100, "exact (%)", 1), ("test_f1", 100, "F1 (%)", 1), ("test_loss", 1, "loss (nats)", 3),
        ):
            values = factor * runs[column]
            spread = f" ± {values.std():.{digits}f}" if len(runs) > 1 else ""
            row[name] = f"{values.mean():.{digits}f}{spread}"
        row["runs"] = str(len(runs))
    return pd.DataFrame(table).T


def tabulate_tasks(rows, measure="exact"):
    """Return a DataFrame of means over the seeds in %, a column per approach, a row per task and wording.

    `measure` is "exact" or "f1".
    """
    names = {f"{measure}_known_wording": "known wordings", f"{measure}_new_wording": "new wordings"}
    means = {
        title: 100 * runs.filter(regex=f"^{measure}_").mean() for title, runs in final_runs(rows).items()
    }
    return pd.DataFrame(means).rename(lambda name: names.get(name, name.removeprefix(f"{measure}_"))).round(1)


def plot_answer_loss(histories):
    """Return a Figure: the answers' validation loss of {title: TextHistory} over the steps, in nats."""
    fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
    for title, history in histories.items():
        ax.plot([*history.validation], [*history.validation.values()], marker="o", ms=4, label=title)
    ax.set(xlabel="step", ylabel="loss of the answers\n(nats per token)", ylim=(0, None))
    ax.legend()
    return fig


def plot_tasks(exact):
    """Return a Figure of `tabulate_scores` without its last rows: a bar per task and column."""
    tasks = exact.drop(["all", "F1, all"], errors="ignore")
    fig, ax = plt.subplots(figsize=(7.5, 0.9 + 0.33 * len(tasks)), layout="constrained")
    height = 0.8 / len(tasks.columns)
    for number, (title, color) in enumerate(zip(tasks, ("grey", "orange", "blue", "green"))):
        places = np.arange(len(tasks)) + (number - (len(tasks.columns) - 1) / 2) * height
        ax.barh(places, tasks[title], height, color=PALETTE[color], label=title)
    ax.set_yticks(range(len(tasks)), tasks.index)
    ax.invert_yaxis()
    ax.set(xlabel="answers that are exactly right (%)", xlim=(0, 100))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


# Command line


def finetune_instructions(args):
    """Train, save the model, answer the test part, write the results into the folder `--output`."""
    check_count("rank", args.rank)
    weights = WEIGHTS_FILE if args.method == "lora" else FULL_FILE
    check_folder(args.output, weights)
    check_outputs(*(args.output / name for name in (weights, RESULTS_FILE, ANSWERS_FILE)))
    choice, device = args.assets or choose_assets("book"), pick_device()
    settings = chosen_settings(args)
    approach = InstructionApproach(args.method, args.method, settings.mask_prompt, args.rank, args.alpha)
    print(choice)
    task = InstructionTask(choice, device, settings, args.size)
    model, history = task.train(approach, settings.learning_rate, settings.seed)
    print_parameters(model)
    notes = {"settings": asdict(settings), "approach": asdict(approach)}
    save_finetuned(model, args.output, task.size, task.config, notes)
    for step, loss in history.validation.items():
        print(f"step {step}: validation loss of the answers {loss:.3f}")
    answers = task.answers(model)
    scores = score_answers(task.parts["test"], answers)
    print(scores.round(3).to_string())
    results = {
        **task.about, **notes, "trained": count_parameters(model)[0], **asdict(history),
        "scores": scores.to_dict("index"),
    }
    write_json(args.output / RESULTS_FILE, results)
    write_json(args.output / ANSWERS_FILE, pair_answers(task.parts["test"], answers))
    files = f"{weights}, {RESULTS_FILE} and {ANSWERS_FILE}"
    print(f"{history.seconds:.0f} s of training; {files} written to {args.output}")


def write_json(path, content):
    """Write `content` as JSON to `path`, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def chosen_settings(args):
    """Return the `InstructionSettings` of the command line."""
    return take_flags(replace(InstructionSettings(), progress=sys.stderr.isatty()), vars(args))


def ask(args):
    """Print the model's answer to one instruction."""
    (entry,) = check_entries([{"instruction": args.instruction, "input": args.input, "output": ""}])
    model, _ = load_finetuned(args.adapter, pick_device())
    print(answer(model, get_tokenizer(), entry, args.max_new_tokens))


def compare_instructions(args):
    """Give each approach its learning rate, train it with all seeds, and print the table."""
    check_outputs(args.output)
    choice = args.assets or choose_assets("embedded")
    settings = chosen_settings(args)
    task = InstructionTask(choice, pick_device(), settings, args.size)
    chosen = [each for each in INSTRUCTION_APPROACHES if not args.only or each.title in args.only]
    base = find_or_run(task, BASE, args.output, print, 0.0, 0, tuning=False)
    runs = run_grid(task, chosen, args.output, args.rates, args.seeds)
    print(tabulate_comparison([base, *runs.to_dict("records")]).to_string())


def add_model_flags(parser, default):
    """Give `parser` the flags that choose data and model."""
    add_assets_flag(parser, default=default)
    parser.add_argument("--size", default="124M", help="of OpenAI's GPT-2: 124M, 355M, 774M or 1558M")


def instruction_parser():
    """Return the parser of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tune = commands.add_parser("finetune", help="train once", formatter_class=HelpFormatter)
    add_model_flags(tune, "book")
    tune.add_argument("--method", choices=("lora", "full"), default="lora", help="LoRA or all weights")
    tune.add_argument("--rank", type=int, default=InstructionApproach.rank, help="LoRA's")
    tune.add_argument("--alpha", type=float, default=InstructionApproach.alpha, help="LoRA's scale itself")
    add_flags(tune, InstructionSettings(), TUNING_FLAGS)
    tune.add_argument("--output", type=Path, default=Path("instructions"), help="folder of the results")
    tune.set_defaults(run=finetune_instructions)
    one = commands.add_parser("ask", help="answer one instruction", formatter_class=HelpFormatter)
    one.add_argument("instruction")
    one.add_argument("--input", default="", help="what the instruction is about")
    one.add_argument("--adapter", type=Path, required=True, help="folder that finetune has written")
    one.add_argument("--max-new-tokens", type=int, default=40, help="of the answer, at most")
    one.set_defaults(run=ask)
    grid = commands.add_parser("compare", help="train every approach", formatter_class=HelpFormatter)
    add_model_flags(grid, "embedded")
    add_flags(grid, InstructionSettings(), ("epochs",))
    grid.add_argument("--output", type=Path, default=INSTRUCTION_RUNS, help="file of finished runs")
    titles = [each.title for each in INSTRUCTION_APPROACHES]
    grid.add_argument("--only", nargs="+", choices=titles, help="these alone")
    grid.add_argument("--rates", type=float, nargs="+", default=RATES, help="grid of learning rates")
    grid.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the comparison")
    grid.set_defaults(run=compare_instructions)
    return parser


@command
def main(arguments=None):
    """Run one command, see --help."""
    args = instruction_parser().parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
