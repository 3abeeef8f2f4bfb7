"""LoRA in practice: fine-tune, evaluate, classify, merge, export, compare.

    python appendix-E/lora_in_practice.py finetune --assets embedded --output adapter
    python appendix-E/lora_in_practice.py classify --adapter adapter "See you at eight"

`finetune` is what you would use in a project: it reads each message's last real token, trains the new head
in full and lets the learning rate fall. `finetune_spam.py` runs the appendix as printed, with its padding
and settings: it is slower and gives other accuracies. The other commands take adapters of both.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from appendix_e import count_parameters
from book_assets import Choice, get_tokenizer, is_quick
from book_assets.downloads import DownloadError
from ch04 import pick_device
from ch06 import save_classifier
from fast_path.settings import TrainingSettings, add_flags, take_flags
from lora.adapters import load_adapter, save_adapter
from lora.layers import apply_lora, merge_lora, print_parameters, unmerge_lora
from lora.peft_format import export_peft, import_peft
from spam_classifier.classifier import (
    CLASSES,
    LoRASettings,
    accuracies,
    build_classifier,
    classify,
    context_length,
    encode_splits,
    finetune,
    load_classifier_adapter,
    load_splits,
    predict_classes,
    save_classifier_adapter,
)
from spam_classifier.evaluation import confusion_matrix, find_leaks, interval_table, wrong_messages
from spam_classifier.experiments import METHODS, compare, summary

__all__ = [
    "apply_lora", "count_parameters", "export_peft", "import_peft", "load_adapter", "merge_lora",
    "save_adapter", "unmerge_lora",
]


# The commands


def finetune_command(assets, model_size, output, **options):
    """Fine-tune, print accuracies, save the adapter."""
    device, size = pick_device(), assets.model_size(model_size)
    training = replace(take_flags(TrainingSettings(), options), progress=sys.stderr.isatty())
    settings = replace(take_flags(LoRASettings(), options), training=training)
    print(assets)
    model, _ = build_classifier(size, training.seed)
    encoded = encode_splits(load_splits(assets, is_quick()), get_tokenizer(), context_length(model))
    settings.adapt(model)
    print_parameters(model)
    history = finetune(model, encoded, training, device)
    for epoch, accuracy in enumerate(history.accuracies, start=1):
        print(f"epoch {epoch}: validation accuracy {accuracy:.2%}")
    for split, accuracy in accuracies(model, encoded, device).items():
        print(f"{split:<10} {accuracy:.2%}")
    folder = save_classifier_adapter(model, output, size, assets, settings)
    print(f"{history.seconds:.0f} s of training; adapter written to {folder}")


def evaluate_command(adapter):
    """Print scores with intervals on the test messages, with and without leaked ones, and the errors."""
    device = pick_device()
    model, _, notes = load_classifier_adapter(adapter, device)
    print(notes["assets"])
    splits = load_splits(notes["assets"], is_quick())
    encoded = encode_splits(splits, get_tokenizer(), context_length(model), notes["pad_to"])
    test, labels = encoded["test"]
    predictions, labels = predict_classes(model, test, device).numpy(), labels.numpy()
    new = ~find_leaks(splits["test"], splits["train"], splits["validation"])["near"].to_numpy()
    results = {"test messages": (labels, predictions), "not seen in training": (labels[new], predictions[new])}
    print(interval_table(results).to_string())
    print("\nrow true, column predicted:", *confusion_matrix(labels, predictions).tolist(), sep="\n")
    for row in wrong_messages(splits["test"], predictions).itertuples():
        print(f"{CLASSES[row.Label]} taken for {CLASSES[row.Prediction]}: {row.Text}")


def classify_command(adapter, messages, json_lines):
    """Print label and probability of each message, from the arguments or the lines of standard input."""
    lines = messages or sys.stdin.read().splitlines()
    texts = [text for text in lines if text.strip()]
    if not texts:
        raise ValueError("there is no message: give some as arguments, or one per line on standard input")
    device = pick_device()
    model, _, notes = load_classifier_adapter(adapter, device)
    for answer in classify(model, texts, get_tokenizer(), device, notes["pad_to"]):
        if json_lines:
            print(json.dumps(answer, ensure_ascii=False))
        else:
            print(f"{answer['label']:<9} {answer['probability']:7.2%}  {answer['text']}")


def merge_command(adapter, output):
    """Write base and adapter as one ordinary classifier of chapter 6."""
    model, config, notes = load_classifier_adapter(adapter, pick_device())
    merge_lora(model)
    save_classifier(output, model, config, max_length=notes["pad_to"] or context_length(model))
    print(f"{output}: read it with ch06.load_classifier")


def export_command(adapter, output):
    """Write the adapter in the format of Hugging Face PEFT."""
    model, _, _ = load_classifier_adapter(adapter, pick_device())
    print(f"{export_peft(model, output)}: read it with peft.PeftModel.from_pretrained")


def compare_command(assets, model_size, seeds, epochs, methods, learning_rates, output):
    """Train every method with every seed (resuming the file of an earlier call) and print the table."""
    print(assets)
    chosen = [m for m in METHODS if not methods or any(word in m.title for word in methods)]
    if not chosen:
        raise ValueError(f"--methods: no title contains {methods}; there are {[m.title for m in METHODS]}")
    if learning_rates:
        chosen = [
            replace(
                m, title=f"{m.title}, learning rate {rate:g}",
                settings=m.settings.with_training(learning_rate=rate),
            )
            for m in chosen for rate in learning_rates
        ]
    runs = compare(
        assets, output, chosen, tuple(seeds), model_size, epochs, quick=is_quick(),
        report=lambda line: print(line, flush=True),
    )
    print(summary(runs).to_string())


# The command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    defaults = LoRASettings()

    sub = add_command(commands, "finetune", finetune_command)
    add_assets(sub)
    add_flags(sub, defaults)
    add_flags(sub, defaults.training)
    sub.add_argument("--output", type=Path, default=Path("adapter"), help="folder of the adapter")

    sub = add_command(commands, "evaluate", evaluate_command)
    add_adapter(sub)

    sub = add_command(commands, "classify", classify_command)
    add_adapter(sub)
    sub.add_argument(
        "--json", action="store_true", dest="json_lines", help="print one line of JSON per message"
    )
    sub.add_argument("messages", nargs="*", default=[], help="without any, standard input is read")

    sub = add_command(commands, "merge", merge_command)
    add_adapter(sub)
    sub.add_argument("--output", type=Path, default=Path("classifier.pth"), help="file to write")

    sub = add_command(commands, "export-peft", export_command)
    add_adapter(sub)
    sub.add_argument("--output", type=Path, default=Path("adapter-peft"), help="folder to write")

    sub = add_command(commands, "compare", compare_command)
    add_assets(sub)
    sub.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run per method and seed")
    sub.add_argument("--epochs", type=int, default=5, help="times through the training messages")
    sub.add_argument("--methods", nargs="+", help="only those with one of these words in their title")
    sub.add_argument(
        "--learning-rates", type=float, nargs="+",
        help="try each method with each of these, to choose by validation accuracy",
    )
    sub.add_argument("--output", type=Path, default=Path("results/compare.jsonl"), help="file of runs")
    return parser


def add_command(commands, name, function):
    sub = commands.add_parser(
        name, help=function.__doc__, description=function.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sub.set_defaults(command=function)
    return sub


def add_assets(sub):
    sub.add_argument(
        "--assets", type=Choice.parse, default=os.environ.get("LLM_ASSETS") or "book", metavar="WHICH",
        help="book, embedded, or the two apart: model=embedded,data=book",
    )
    sub.add_argument(
        "--model-size", choices=("124M", "355M", "774M", "1558M"), default="124M",
        help="which of OpenAI's models, where assets say model=book",
    )


def add_adapter(sub):
    sub.add_argument("--adapter", type=Path, default=Path("adapter"), help="folder that a fine-tuning wrote")


def main(arguments=None):
    """Run one command. User errors end with a message instead of a traceback."""
    options = vars(build_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        command(**options)
    except (ValueError, FileNotFoundError, DownloadError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
