"""LoRA as people use it: targets, merging, adapters on disk, PEFT's format, and what it buys.

    python appendix-E/lora_in_practice.py finetune --assets embedded --output adapter
    echo "You won a prize, call now" | python appendix-E/lora_in_practice.py classify --adapter adapter

`lora-in-practice.ipynb` explains it. All its definitions can be imported from here; they stand in
`lora_layers` (targets, merging), `lora_adapters` (files, switching, combining), `lora_peft` (PEFT's
format), `lora_classifier` (the spam classifier), `lora_evaluation` (honest test sets) and
`lora_experiments` (the comparison).
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from appendix_e import SCALINGS, LinearWithLoRA, LoRALayer, count_parameters, freeze
from book_assets import choose_assets, get_tokenizer, is_quick
from book_downloads import DownloadError
from ch04 import pick_device
from ch06 import save_classifier
from fast_training import PRECISIONS, FastSettings
from lora_adapters import (
    Adapter,
    combine_adapters,
    fingerprint,
    load_adapter,
    read_adapter,
    save_adapter,
    set_adapter,
    take_adapter,
)
from lora_classifier import (
    CLASSES,
    PARTS,
    LoRASettings,
    accuracies,
    balanced_messages,
    book_split,
    build_classifier,
    classify,
    context_length,
    encode_split,
    finetune,
    guesses,
    load_classifier_adapter,
    model_size,
    save_classifier_adapter,
)
from lora_evaluation import (
    bootstrap,
    confusion_matrix,
    find_leaks,
    interval_table,
    masked,
    plot_confusion,
    scores,
    split_without_leaks,
    wrong_messages,
)
from lora_experiments import METHODS, Method, compare, plot_costs, plot_ranks, step_memory, summary
from lora_layers import (
    ROLES,
    Conv1DWithLoRA,
    adapted_layers,
    apply_lora,
    find_layers,
    is_conv1d,
    is_merged,
    matches,
    merge_lora,
    merged_weight,
    print_parameters,
    remove_lora,
    swap,
    unmerge_lora,
    with_lora,
)
from lora_peft import export_peft, import_peft

__all__ = [
    "CLASSES", "METHODS", "PARTS", "ROLES", "SCALINGS", "Adapter", "Conv1DWithLoRA", "LinearWithLoRA",
    "LoRALayer", "LoRASettings", "Method", "accuracies", "adapted_layers", "apply_lora", "book_split",
    "bootstrap", "build_classifier", "classify", "combine_adapters", "compare", "confusion_matrix",
    "context_length", "count_parameters", "encode_split", "export_peft", "find_layers", "find_leaks",
    "finetune", "fingerprint", "freeze", "guesses", "import_peft", "interval_table", "is_conv1d",
    "is_merged", "load_adapter", "load_classifier_adapter", "matches", "merge_lora", "merged_weight",
    "model_size", "masked", "plot_confusion", "plot_costs", "plot_ranks", "print_parameters",
    "read_adapter", "balanced_messages", "remove_lora", "save_adapter", "save_classifier_adapter", "scores",
    "set_adapter", "split_without_leaks", "step_memory", "summary", "swap", "take_adapter",
    "unmerge_lora", "with_lora", "wrong_messages",
]


# The commands


def finetune_command(args):
    """Fine-tune, print accuracies, save the adapter."""
    choice, device = args.assets, pick_device()
    print(choice)
    size = model_size(choice, args.model_size)
    settings = LoRASettings(**{name: getattr(args, name) for name in asdict(LoRASettings())})
    model, _ = build_classifier(size, settings.seed)
    parts = book_split(balanced_messages(choice), is_quick())
    split = encode_split(parts, get_tokenizer(), context_length(model))
    settings.adapt(model)
    print_parameters(model)
    fast = {name: getattr(args, name) for name in FAST}
    history = finetune(model, split, settings, device, progress=sys.stderr.isatty(), **fast)
    for epoch, accuracy in enumerate(history.accuracies, start=1):
        print(f"epoch {epoch}: validation accuracy {accuracy:.2%}")
    for part, accuracy in accuracies(model, split, device).items():
        print(f"{part:<10} {accuracy:.2%}")
    folder = save_classifier_adapter(model, args.output, size, choice, settings)
    print(f"{history.seconds:.0f} s of training, {history.data_share:.1%} of it spent on data; "
          f"adapter written to {folder}")


def evaluate_command(args):
    """Print scores with intervals on the test part, with and without leaked messages, and the errors."""
    choice, device = args.assets, pick_device()
    print(choice)
    model, _, _ = load_classifier_adapter(args.adapter, device)
    parts = book_split(balanced_messages(choice), is_quick())
    encoded, labels = encode_split(parts, get_tokenizer(), context_length(model))["test"]
    answers, labels = guesses(model, encoded, device).numpy(), labels.numpy()
    new = ~find_leaks(parts["test"], parts["train"], parts["validation"])["near"].to_numpy()
    results = {"test part": (labels, answers), "not seen in training": (labels[new], answers[new])}
    print(interval_table(results).to_string())
    print("\nrow true, column predicted:", *confusion_matrix(labels, answers).tolist(), sep="\n")
    for row in wrong_messages(parts["test"], answers).itertuples():
        print(f"{CLASSES[row.Label]} taken for {CLASSES[row.Guess]}: {row.Text}")


def classify_command(args):
    """Print label and probability of each message, from the arguments or a line each of standard input."""
    lines = args.messages or sys.stdin.read().splitlines()
    texts = [text for text in lines if text.strip()]
    if not texts:
        raise ValueError("there is no message: give some as arguments, or one a line on standard input")
    device = pick_device()
    model, _, _ = load_classifier_adapter(args.adapter, device)
    for answer in classify(model, texts, get_tokenizer(), device):
        if args.json:
            print(json.dumps(answer, ensure_ascii=False))
        else:
            print(f"{answer['label']:<9} {answer['probability']:7.2%}  {answer['text']}")


def merge_command(args):
    """Write base and adapter as one ordinary classifier of chapter 6."""
    model, config, _ = load_classifier_adapter(args.adapter, pick_device())
    merge_lora(model)
    save_classifier(args.output, model, config, max_length=context_length(model))
    print(f"{args.output}: read it with ch06.load_classifier")


def export_command(args):
    """Write the adapter in the format of Hugging Face PEFT."""
    model, _, _ = load_classifier_adapter(args.adapter, pick_device())
    print(f"{export_peft(model, args.output)}: read it with peft.PeftModel.from_pretrained")


def compare_command(args):
    """Train every method with every seed (continuing the file of an earlier call) and print the table."""
    print(args.assets)
    methods = [m for m in METHODS if not args.methods or any(word in m.title for word in args.methods)]
    if not methods:
        raise ValueError(f"--methods: no title holds {args.methods}; there are {[m.title for m in METHODS]}")
    if args.learning_rates:
        methods = [
            replace(m, title=f"{m.title}, learning rate {rate:g}", learning_rate=rate)
            for m in methods for rate in args.learning_rates
        ]
    runs = compare(
        args.assets, args.output, methods, tuple(args.seeds), args.model_size, args.epochs,
        quick=is_quick(), report=lambda line: print(line, flush=True),
    )
    print(summary(runs).to_string())


# The command line

NUMBERS = {
    "rank": "columns of A, rows of B", "alpha": "weight of the LoRA layers, see --scaling",
    "dropout": "share of the LoRA branch's inputs dropped in training", "learning_rate": "AdamW's",
    "weight_decay": "AdamW's", "epochs": "times through the training messages",
    "batch_size": "messages a step", "seed": "of the head, LoRA's A and the order of messages",
}
FAST = {  # fields of FastSettings
    "precision": {"choices": ("auto", *PRECISIONS), "help": "of products and frozen weights"},
    "accumulate": {"type": int, "help": "batches that make one optimizer step"},
    "gradient_checkpointing": {"action": "store_true", "help": "less memory, a third more time"},
    "compile": {"action": "store_true", "help": "torch.compile: a minute of warm-up"},
}


def assets(text):
    """The type of --assets: it counts more than the variable LLM_ASSETS."""
    os.environ["LLM_ASSETS"] = text
    return choose_assets()


def parser():
    main = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = main.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_finetune, add_evaluate, add_classify, add_merge, add_export, add_compare):
        add(commands)
    return main


def command(commands, name, function):
    sub = commands.add_parser(
        name, help=function.__doc__, description=function.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sub.set_defaults(function=function)
    return sub


def add_assets(sub, size=True):
    default = os.environ.get("LLM_ASSETS") or "book"
    sub.add_argument("--assets", type=assets, default=default, metavar="WHICH",
                     help="book, embedded, or the two apart: model=embedded,data=book")
    if size:
        sub.add_argument("--model-size", choices=("124M", "355M", "774M", "1558M"), default="124M",
                         help="which of OpenAI's models, where assets say model=book")


def add_finetune(commands):
    sub, defaults = command(commands, "finetune", finetune_command), LoRASettings()
    add_assets(sub)
    for name, text in NUMBERS.items():
        value = getattr(defaults, name)
        sub.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=text)
    sub.add_argument("--scaling", choices=SCALINGS, default=defaults.scaling, help="the factor of x A B")
    sub.add_argument("--targets", nargs="+", default=defaults.targets,
                     help=f"all, roles ({', '.join(ROLES)}) or name patterns")
    sub.add_argument("--train-in-full", nargs="*", default=defaults.train_in_full,
                     help="modules to train themselves instead, by role or pattern; nothing: none")
    for name, options in FAST.items():
        default = getattr(FastSettings(), name)
        sub.add_argument(f"--{name.replace('_', '-')}", default=default, **options)
    sub.add_argument("--output", type=Path, default=Path("adapter"), help="folder of the adapter")


def add_evaluate(commands):
    sub = command(commands, "evaluate", evaluate_command)
    add_assets(sub, size=False)
    add_adapter(sub)


def add_adapter(sub):
    sub.add_argument("--adapter", type=Path, default=Path("adapter"), help="folder that finetune wrote")


def add_classify(commands):
    sub = command(commands, "classify", classify_command)
    add_adapter(sub)
    sub.add_argument("--json", action="store_true", help="print a line of JSON a message")
    sub.add_argument("messages", nargs="*", default=[], help="without any, standard input is read")


def add_merge(commands):
    sub = command(commands, "merge", merge_command)
    add_adapter(sub)
    sub.add_argument("--output", type=Path, default=Path("classifier.pth"), help="file to write")


def add_export(commands):
    sub = command(commands, "export-peft", export_command)
    add_adapter(sub)
    sub.add_argument("--output", type=Path, default=Path("adapter-peft"), help="folder to write")


def add_compare(commands):
    sub = command(commands, "compare", compare_command)
    add_assets(sub)
    sub.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run a method and seed")
    sub.add_argument("--epochs", type=int, default=5, help="times through the training messages")
    sub.add_argument("--methods", nargs="+", help="only those with one of these words in their title")
    sub.add_argument("--learning-rates", type=float, nargs="+",
                     help="try each method with each of these, to choose by validation accuracy")
    sub.add_argument("--output", type=Path, default=Path("results/compare.jsonl"), help="file of runs")


def main(arguments=None):
    """Run one command; what the reader can mend ends it with a message, not a traceback."""
    args = parser().parse_args(arguments)
    try:
        args.function(args)
    except (ValueError, FileNotFoundError, DownloadError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
