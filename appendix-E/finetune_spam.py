"""Fine-tune the spam classifier with LoRA as the appendix prints it: its loop, its settings, its numbers.

    python appendix-E/finetune_spam.py --assets embedded --output-dir results
    python appendix-E/lora_in_practice.py classify --adapter results "See you at eight"

Every message is padded to the longest one, and the answer is read at the last position, in training and
afterwards. `lora_in_practice.py finetune` is what you would use in a project: it reads the last real token,
trains the new head in full and lets the learning rate fall, which is faster and gives other accuracies.
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
from fast_path.settings import add_flags, take_flags
from spam_classifier.classifier import PRINTED, save_classifier_adapter

FLAGS = {"rank", "alpha", "scaling", "epochs", "learning_rate", "weight_decay", "batch_size", "seed"}


def prepare_datasets(splits, context_length, folder):
    """Write train.csv, validation.csv, test.csv into `folder`; return their `ch06.SpamDataset`s by name.

    `splits` are DataFrames by name. Messages are cut to the longest one of training, or to
    `context_length` tokens if that is less.
    """
    tokenizer, datasets = get_tokenizer(), {}
    max_length = None
    for name, split in splits.items():
        file = folder / f"{name}.csv"
        split.to_csv(file, index=None)
        datasets[name] = SpamDataset(file, tokenizer, max_length)
        if datasets[name].max_length > context_length:
            datasets[name] = SpamDataset(file, tokenizer, context_length)
        max_length = datasets[name].max_length
    return datasets


def make_loaders(datasets, batch_size, seed):
    """Return a DataLoader for each dataset by name; only "train" is shuffled and drops its last batch."""
    torch.manual_seed(seed)
    return {
        name: DataLoader(dataset, batch_size, shuffle=name == "train", drop_last=name == "train")
        for name, dataset in datasets.items()
    }


def accuracy_by_split(model, loaders, device, num_batches=None):
    """Return by name the accuracy, 0 to 1, on `num_batches` batches of each loader (None: all)."""
    return {
        name: calc_accuracy_loader(loader, model, device, num_batches) for name, loader in loaders.items()
    }


def put_lora_in(model, rank, alpha, scaling):
    """Freeze `model`, put LoRA into every linear layer; print the number of trained parameters on the way."""
    print(f"Trainable parameters: {count_parameters(model)[0]:,}", end="")
    freeze(model)
    print(f" → frozen: {count_parameters(model)[0]:,}", end="")
    replace_linear_with_lora(model, rank, alpha, scaling=scaling)
    print(f" → LoRA of rank {rank}: {count_parameters(model)[0]:,}", flush=True)


def train_with_lora(model, loaders, device, *, epochs, learning_rate, weight_decay, seed):
    """Run listing E.7's training; return its curves by name and the seconds that it took."""
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
    """Write loss.png and accuracy.png into `folder` and return their paths."""
    paths = [folder / "loss.png", folder / "accuracy.png"]
    for path, kind in zip(paths, ("losses", "accs"), strict=True):
        train_values, val_values = curves[f"train_{kind}"], curves[f"val_{kind}"]
        epochs_seen = torch.linspace(0, epochs, len(train_values))
        examples_seen = torch.linspace(0, curves["examples_seen"], len(train_values))
        plot_values(epochs_seen, examples_seen, train_values, val_values, path.stem, save_as=path)
    return paths


def accuracy_table(rows):
    """Return lines of text: a title line, then one line for each label of `rows` with its accuracies."""
    lines = [f"{'accuracy':<20}{'training':>12}{'validation':>12}{'test':>12}"]
    for label, row in rows.items():
        lines.append(f"{label:<20}" + "".join(f"{value:>12.2%}" for value in row.values()))
    return "\n".join(lines)


def describe_machine(device):
    """Return what a reader needs to compare times: platform, processor, device, versions."""
    return {
        "platform": platform.platform(), "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
    }


def run_main_job(choice, settings, folder):
    """Do the main job on the `choice` of assets with `LoRASettings`; write only into `folder`."""
    start, device, training = time.perf_counter(), pick_device(), settings.training
    print(choice)
    folder.mkdir(parents=True, exist_ok=True)
    model, config = load_gpt2_model(choice.model_size())
    datasets = prepare_datasets(spam_splits(choice), config["context_length"], folder)
    length = datasets["train"].max_length
    counts = ", ".join(f"{len(dataset)} {name}" for name, dataset in datasets.items())
    print(f"Messages: {counts}, of {length} tokens; device: {device}")
    loaders = make_loaders(datasets, training.batch_size, training.seed)
    torch.manual_seed(training.seed)
    add_classification_head(model, num_classes=2).to(device)
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
        "assets": asdict(choice), "settings": asdict(settings), "machine": describe_machine(device),
        "accuracy_before": before, "accuracy_after": after, **curves,
        "seconds": round(time.perf_counter() - start, 1),
    }
    paths = [*save_plots(curves, training.epochs, folder), folder / "results.json"]
    paths[-1].write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"{results['seconds']} s, of these {curves['training_seconds']} s training. Written:")
    print(*(f"  {path}" for path in paths), sep="\n")
    print(f'Try it: python appendix-E/lora_in_practice.py classify --adapter "{folder}" "See you at eight"')


def parse_arguments(arguments=None):
    """Return the `Choice` of assets, the `LoRASettings` and the output folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--assets", type=Choice.parse, default=os.environ.get("LLM_ASSETS") or "book", metavar="WHICH",
        help="book (OpenAI's 124M weights, UCI's messages), embedded, or e.g. model=embedded,data=book",
    )
    add_flags(parser, PRINTED, FLAGS)
    add_flags(parser, PRINTED.training, FLAGS)
    parser.add_argument("--output-dir", type=Path, default=Path("results"), help="for all that is written")
    options = vars(parser.parse_args(arguments))
    for name in ("epochs", "rank", "batch_size"):
        if options[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    settings = replace(
        take_flags(PRINTED, options), training=take_flags(PRINTED.training, options)
    )
    return options["assets"], settings, options["output_dir"]


def main(arguments=None):
    """The command line, see --help. User errors end with a message instead of a traceback."""
    choice, settings, folder = parse_arguments(arguments)
    try:
        run_main_job(choice, settings, folder)
    except DownloadError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
