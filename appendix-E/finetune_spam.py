"""Fine-tune the spam classifier with LoRA exactly as appendix E prints it: its loop, settings and plots.

    python appendix-E/finetune_spam.py --assets embedded --output-dir results
    python appendix-E/lora_in_practice.py classify --adapter results "Are we still on for dinner?"

Take this command to follow the book and compare your numbers with its numbers. For your own work take
`lora_in_practice.py finetune`, which is several times faster. The accuracies differ because the printed
loop pads every message to the longest one and reads the answer at the last position, mostly padding;
the other command reads it at the message's last token, trains the new head in full, and lets a higher
learning rate decay. Both save an adapter that the other commands of `lora_in_practice.py` read.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

try:
    from book_assets.command_line import add_assets_flag, command
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")
import torch
from torch.utils.data import DataLoader

from appendix_e import count_parameters, freeze, replace_linear_with_lora
from book_assets import choose_assets, get_tokenizer
from book_assets.files import check_outputs, replacing, write_whole
from ch04 import pick_device
from ch05 import evaluation_epochs, load_gpt2_model
from ch06 import (
    SPLITS,
    SpamDataset,
    add_classification_head,
    calc_accuracy_loader,
    plot_values,
    spam_splits,
    train_classifier_simple,
)
from fast_path.settings import HelpFormatter, add_flags, take_flags
from lora.adapters import WEIGHTS_FILE
from spam_classifier.classifier import PRINTED, save_classifier_adapter

# Listing E.7's settings: of the fast path's options it has none.
AS_PRINTED = PRINTED.with_training(bucket=1, decay=False, precision="float32", fused_attention=False)
EVAL_FREQ = 50  # steps from one line of the training log to the next
PLOTS = {"loss.png": "losses", "accuracy.png": "accs"}
FLAGS = ("rank", "alpha", "scaling", "epochs", "learning_rate", "weight_decay", "batch_size", "seed")


def prepare_datasets(splits, context_length, folder):
    """Write each of `splits`, {name: DataFrame}, into `folder` as CSV; return {name: `ch06.SpamDataset`}.

    All messages are padded or cut to the longest training message, or to `context_length` tokens if
    that is less.
    """
    for name, split in splits.items():
        with replacing(folder / f"{name}.csv") as partial:
            split.to_csv(partial, index=None)
    tokenizer = get_tokenizer()
    longest = SpamDataset(folder / "train.csv", tokenizer).max_length
    length = min(longest, context_length)
    return {name: SpamDataset(folder / f"{name}.csv", tokenizer, length) for name in splits}


def make_loaders(datasets, batch_size, seed):
    """Return {name: DataLoader}; only "train" is shuffled and drops an incomplete last batch."""
    torch.manual_seed(seed)
    return {
        name: DataLoader(dataset, batch_size, shuffle=name == "train", drop_last=name == "train")
        for name, dataset in datasets.items()
    }


def accuracy_by_split(model, loaders, device, num_batches=None):
    """Return {name: accuracy, 0 to 1} on the first `num_batches` batches of each loader (None: all)."""
    return {
        name: calc_accuracy_loader(loader, model, device, num_batches) for name, loader in loaders.items()
    }


def put_lora_in(model, rank, alpha, scaling):
    """Freeze `model`, put LoRA into every linear layer; print the trainable parameters of each step."""
    at_first, _ = count_parameters(model)
    freeze(model)
    frozen, _ = count_parameters(model)
    replace_linear_with_lora(model, rank, alpha, scaling=scaling)
    added, _ = count_parameters(model)
    print(f"Trainable parameters: {at_first:,} → frozen: {frozen:,} → LoRA of rank {rank}: {added:,}")


def train_with_lora(model, loaders, device, *, epochs, learning_rate, weight_decay, seed):
    """Run listing E.7's training; return a dictionary of its curves and of its duration in seconds."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    results = train_classifier_simple(
        model, loaders["train"], loaders["validation"], optimizer, device,
        num_epochs=epochs, eval_freq=EVAL_FREQ, eval_iter=5, progress=sys.stderr.isatty(),
    )
    names = ("train_losses", "val_losses", "train_accs", "val_accs", "examples_seen")
    curves = dict(zip(names, results, strict=True))
    return curves | {"training_seconds": round(time.perf_counter() - start, 3)}


def save_plots(results, folder):
    """Plot losses and accuracies into loss.png and accuracy.png in `folder`."""
    epochs = results["settings"]["training"]["epochs"]
    per_epoch = results["examples_seen"] / epochs
    steps_per_epoch = per_epoch / results["settings"]["training"]["batch_size"]
    evaluations = evaluation_epochs(len(results["train_losses"]), EVAL_FREQ, steps_per_epoch)
    for (name, kind), epochs_seen in zip(PLOTS.items(), (evaluations, range(1, epochs + 1)), strict=True):
        values = results[f"train_{kind}"], results[f"val_{kind}"]
        examples_seen = [per_epoch * epoch for epoch in epochs_seen]
        plot_values(epochs_seen, examples_seen, *values, Path(name).stem, save_as=folder / name)


def accuracy_table(rows):
    """Return a text: a header, then one line per label of `rows`, {label: {split: accuracy}}."""
    lines = [f"{'accuracy':<20}{'training':>12}{'validation':>12}{'test':>12}"]
    for label, row in rows.items():
        lines.append(f"{label:<20}" + "".join(f"{value:>12.2%}" for value in row.values()))
    return "\n".join(lines)


def describe_machine(device):
    """Return what a reader needs to compare times: platform, processor, device, threads, versions."""
    return {
        "platform": platform.platform(), "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
    }


def prepare_model_and_data(choice, training, folder, device):
    """Return (GPT-2 with a new head on `device`, {name: DataLoader}, tokens per message)."""
    model, config = load_gpt2_model(choice.model_size())
    datasets = prepare_datasets(spam_splits(choice), config["context_length"], folder)
    length = datasets["train"].max_length
    counts = ", ".join(f"{len(dataset)} {name}" for name, dataset in datasets.items())
    print(f"Messages: {counts}, of {length} tokens; device: {device}")
    loaders = make_loaders(datasets, training.batch_size, training.seed)
    torch.manual_seed(training.seed)
    add_classification_head(model, num_classes=2).to(device)
    return model, loaders, length


def output_files(folder):
    """Return the paths of all files that the main job writes: plots, numbers, adapter, messages."""
    tables = [f"{split}.csv" for split in SPLITS]
    return [Path(folder, name) for name in (*PLOTS, "results.json", WEIGHTS_FILE, *tables)]


def run_main_job(choice, settings, folder):
    """Do the main job on the `choice` of assets with `LoRASettings`; write only into `folder`.

    What has been trained is saved before anything about it is printed, numbers before pictures. Raises
    `book_assets.files.OutputError` at once if `folder` cannot be written.
    """
    start = time.perf_counter()
    check_outputs(*output_files(folder))
    device = pick_device()
    training = settings.training
    print(choice)
    model, loaders, length = prepare_model_and_data(choice, training, folder, device)
    torch.manual_seed(training.seed)
    before = accuracy_by_split(model, loaders, device, num_batches=10)
    put_lora_in(model, settings.rank, settings.alpha, settings.scaling)
    curves = train_with_lora(
        model, loaders, device, epochs=training.epochs, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, seed=training.seed,
    )
    save_classifier_adapter(model, folder, choice.model_size(), choice, settings, pad_to=length)
    after = accuracy_by_split(model, loaders, device)
    results = {
        "assets": asdict(choice), "settings": asdict(settings),
        "accuracy_before": before, "accuracy_after": after, **curves,
        "seconds": round(time.perf_counter() - start, 3), "machine": describe_machine(device),
    }
    write_whole(folder / "results.json", json.dumps(results, indent=2, allow_nan=False))
    save_plots(results, folder)
    print("", accuracy_table({"before (10 batches)": before, "after (all)": after}), "", sep="\n")
    print_files(results, folder)


def print_files(results, folder):
    """Print how long the main job took, what it has written and what to do with it."""
    print(f"{results['seconds']:.1f} s, of these {results['training_seconds']:.1f} s training. Written:")
    print(*(f"  {path}" for path in output_files(folder)), sep="\n")
    script = Path(__file__).with_name("lora_in_practice.py")  # the reader may be in another folder
    classify = f'"{sys.executable}" "{script}" classify --adapter "{folder}"'
    print(f'Try it: {classify} "Are we still on for dinner?"')


def parse_arguments(arguments=None):
    """Return the `Choice` of assets, the `LoRASettings` and the output folder of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_assets_flag(parser)
    add_flags(parser, AS_PRINTED, FLAGS)
    add_flags(parser, AS_PRINTED.training, FLAGS)
    parser.add_argument("--output-dir", type=Path, default=Path("results"), help="folder for all files")
    options = vars(parser.parse_args(arguments))
    training = take_flags(AS_PRINTED.training, options)
    settings = replace(take_flags(AS_PRINTED, options), training=training)
    return options["assets"] or choose_assets("book"), settings, options["output_dir"]


@command
def main(arguments=None):
    """Run the command, see --help."""
    run_main_job(*parse_arguments(arguments))


if __name__ == "__main__":
    main()
