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
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from appendix_e import count_parameters, freeze, replace_linear_with_lora
from book_assets import Choice, get_tokenizer
from book_assets.downloads import DownloadError
from ch04 import pick_device
from ch05 import load_gpt2_model
from ch06 import (
    SpamDataset,
    add_classification_head,
    calc_accuracy_loader,
    plot_values,
    spam_splits,
    train_classifier_simple,
)
from fast_path.settings import HelpFormatter, add_flags, take_flags
from spam_classifier.classifier import PRINTED, save_classifier_adapter

# Listing E.7's settings: of the fast path's options it has none.
AS_PRINTED = PRINTED.with_training(bucket=1, decay=False, precision="float32", fused_attention=False)
FLAGS = ("rank", "alpha", "scaling", "epochs", "learning_rate", "weight_decay", "batch_size", "seed")


def prepare_datasets(splits, context_length, folder):
    """Write each of `splits`, {name: DataFrame}, into `folder` as CSV; return {name: `ch06.SpamDataset`}.

    All messages are padded or cut to the longest training message, or to `context_length` tokens if
    that is less.
    """
    for name, split in splits.items():
        split.to_csv(folder / f"{name}.csv", index=None)
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
    """Freeze `model`, put LoRA into every linear layer; print the trainable parameters after each step."""
    print(f"Trainable parameters: {count_parameters(model)[0]:,}", end="")
    freeze(model)
    print(f" → frozen: {count_parameters(model)[0]:,}", end="")
    replace_linear_with_lora(model, rank, alpha, scaling=scaling)
    print(f" → LoRA of rank {rank}: {count_parameters(model)[0]:,}", flush=True)


def train_with_lora(model, loaders, device, *, epochs, learning_rate, weight_decay, seed):
    """Run listing E.7's training; return a dictionary of its curves and of its duration in seconds."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    results = train_classifier_simple(
        model, loaders["train"], loaders["validation"], optimizer, device,
        num_epochs=epochs, eval_freq=50, eval_iter=5, progress=sys.stderr.isatty(),
    )
    names = ("train_losses", "val_losses", "train_accs", "val_accs", "examples_seen")
    curves = dict(zip(names, results, strict=True))
    return curves | {"training_seconds": round(time.perf_counter() - start, 1)}


def save_plots(curves, epochs, folder):
    """Plot losses and accuracies into loss.png and accuracy.png in `folder`; return the two paths."""
    paths = [folder / "loss.png", folder / "accuracy.png"]
    for path, kind in zip(paths, ("losses", "accs"), strict=True):
        train_values, val_values = curves[f"train_{kind}"], curves[f"val_{kind}"]
        epochs_seen = torch.linspace(0, epochs, len(train_values))
        examples_seen = torch.linspace(0, curves["examples_seen"], len(train_values))
        plot_values(epochs_seen, examples_seen, train_values, val_values, path.stem, save_as=path)
    return paths


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


def write_results(results, folder):
    """Write the plots and results.json into `folder` and print their paths."""
    epochs = results["settings"]["training"]["epochs"]
    paths = [*save_plots(results, epochs, folder), folder / "results.json"]
    paths[-1].write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"{results['seconds']} s, of these {results['training_seconds']} s training. Written:")
    print(*(f"  {path}" for path in paths), sep="\n")


def run_main_job(choice, settings, folder):
    """Do the main job on the `choice` of assets with `LoRASettings`; write only into `folder`."""
    start = time.perf_counter()
    device = pick_device()
    training = settings.training
    print(choice)
    folder.mkdir(parents=True, exist_ok=True)
    model, loaders, length = prepare_model_and_data(choice, training, folder, device)
    torch.manual_seed(training.seed)
    before = accuracy_by_split(model, loaders, device, num_batches=10)
    put_lora_in(model, settings.rank, settings.alpha, settings.scaling)
    curves = train_with_lora(
        model, loaders, device, epochs=training.epochs, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, seed=training.seed,
    )
    after = accuracy_by_split(model, loaders, device)
    save_classifier_adapter(model, folder, choice.model_size(), choice, settings, pad_to=length)
    print("", accuracy_table({"before (10 batches)": before, "after (all)": after}), "", sep="\n")
    results = {
        "assets": asdict(choice), "settings": asdict(settings),
        "accuracy_before": before, "accuracy_after": after, **curves,
        "seconds": round(time.perf_counter() - start, 1), "machine": describe_machine(device),
    }
    write_results(results, folder)
    command = "python appendix-E/lora_in_practice.py classify"
    print(f'Try it: {command} --adapter "{folder}" "Are we still on for dinner?"')


def parse_arguments(arguments=None):
    """Return the `Choice` of assets, the `LoRASettings` and the output folder of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--assets", type=Choice.parse, default=os.environ.get("LLM_ASSETS") or "book", metavar="WHICH",
        help="book (OpenAI's 124M weights, UCI's messages), embedded, or e.g. model=embedded,data=book",
    )
    add_flags(parser, AS_PRINTED, FLAGS)
    add_flags(parser, AS_PRINTED.training, FLAGS)
    parser.add_argument("--output-dir", type=Path, default=Path("results"), help="folder for all files")
    options = vars(parser.parse_args(arguments))
    for name in ("epochs", "rank", "batch_size"):
        if options[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    training = take_flags(AS_PRINTED.training, options)
    settings = replace(take_flags(AS_PRINTED, options), training=training)
    return options["assets"], settings, options["output_dir"]


def main(arguments=None):
    """Run the command, see --help. User errors end with a message instead of a traceback."""
    choice, settings, folder = parse_arguments(arguments)
    try:
        run_main_job(choice, settings, folder)
    except DownloadError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
