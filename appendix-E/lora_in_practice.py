"""LoRA in practice: fine-tune, evaluate, classify, merge, export, compare, estimate memory.

    python appendix-E/lora_in_practice.py finetune --assets embedded --output adapter
    python appendix-E/lora_in_practice.py classify --adapter adapter "Are we still on for dinner?"

Take `finetune` for your own work: it reads the answer at each message's last token, trains the new head
in full and lets the learning rate decay. `finetune_spam.py` runs appendix E as printed: it pads every
message to the longest one and reads the answer at the last position, with the book's settings, so it is
several times slower and gives other accuracies. The other commands take the adapters of both.
"""

import argparse
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

try:
    from book_assets.command_line import add_assets_flag, command, read_lines
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")
from appendix_e import count_parameters
from book_assets import choose_assets, get_tokenizer
from book_assets.files import check_outputs
from ch04 import pick_device
from ch06 import save_classifier
from fast_path.settings import HelpFormatter, TrainingSettings, add_flags, take_flags
from lora.adapters import WEIGHTS_FILE, load_adapter, save_adapter
from lora.layers import apply_lora, merge_lora, print_parameters, unmerge_lora
from lora.memory_estimate import BODY, BYTES, GPT2_SHAPES, WHAT_TRAINS, estimate_memory, shape_of
from lora.optimizer import lora_adamw
from lora.peft_format import PEFT_SETTINGS, PEFT_WEIGHTS, export_peft, import_peft
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
from spam_classifier.memory_check import build_random_classifier, measure_step

__all__ = [
    "apply_lora", "count_parameters", "export_peft", "import_peft", "load_adapter", "lora_adamw",
    "merge_lora", "save_adapter", "unmerge_lora",
]


# The commands


def finetune_command(model_size, output, assets=None, **options):
    """Fine-tune on the fast path, print the accuracies, save the adapter.

    Take this for your own work, and finetune_spam.py for appendix E as printed, which is several times
    slower and, with other settings and padding, has other accuracies.
    """
    check_outputs(Path(output, WEIGHTS_FILE))
    device = pick_device()
    assets = assets or choose_assets("book")
    size = assets.model_size(model_size)
    training = replace(take_flags(TrainingSettings(), options), progress=sys.stderr.isatty())
    settings = replace(take_flags(LoRASettings(), options), training=training)
    print(assets)
    model, _ = build_classifier(size, training.seed)
    encoded = encode_splits(load_splits(assets), get_tokenizer(), context_length(model))
    settings.adapt(model)
    print_parameters(model)
    history = finetune(model, encoded, training, device)
    folder = save_classifier_adapter(model, output, size, assets, settings)
    for epoch, accuracy in enumerate(history.accuracies, start=1):
        print(f"epoch {epoch}: validation accuracy {accuracy:.2%}")
    for split, accuracy in accuracies(model, encoded, device).items():
        print(f"{split:<10} {accuracy:.2%}")
    print(f"{history.seconds:.0f} s of training; adapter written to {folder}")


def evaluate_command(adapter):
    """Print scores with intervals on the test messages, with and without leaked ones, and the errors.

    Model and messages are those that the adapter's notes name.
    """
    device = pick_device()
    model, _, notes = load_classifier_adapter(adapter, device)
    print(notes["assets"])
    splits = load_splits(notes["assets"])
    encoded = encode_splits(splits, get_tokenizer(), context_length(model), notes["pad_to"])
    test, labels = encoded["test"]
    labels, predictions = labels.numpy(), predict_classes(model, test, device).numpy()
    new = ~find_leaks(splits["test"], splits["train"], splits["validation"])["near"].to_numpy()
    print(interval_table({
        "test messages": (labels, predictions), "not seen in training": (labels[new], predictions[new]),
    }).to_string())
    print("\nrow true, column predicted:", *confusion_matrix(labels, predictions).tolist(), sep="\n")
    for row in wrong_messages(splits["test"], predictions).itertuples():
        print(f"{CLASSES[row.Label]} taken for {CLASSES[row.Prediction]}: {row.Text}")


def classify_command(adapter, messages=(), json_lines=False):
    """Print the label of each message and its probability."""
    texts = messages or [line for line in read_lines() if line.strip()]
    if not any(text.strip() for text in texts):
        raise ValueError("there is no message: give some as arguments, or one per line on standard input")
    device = pick_device()
    model, _, notes = load_classifier_adapter(adapter, device)
    for answer in classify(model, texts, get_tokenizer(), device, notes["pad_to"]):
        if json_lines:
            print(json.dumps(answer, ensure_ascii=False))
        else:
            print(f"{answer['label']:<9} {answer['probability']:7.2%}  {answer['text']}")


def merge_command(adapter, output):
    """Merge adapter and base model into an ordinary classifier of chapter 6, one file."""
    check_outputs(output)
    model, config, notes = load_classifier_adapter(adapter, pick_device())
    merge_lora(model)
    save_classifier(output, model, config, max_length=notes["pad_to"])
    print(f"{output}: read it with ch06.load_classifier")


def export_command(adapter, output):
    """Write the adapter in the format of Hugging Face PEFT."""
    check_outputs(Path(output, PEFT_WEIGHTS), Path(output, PEFT_SETTINGS))
    model, _, _ = load_classifier_adapter(adapter, pick_device())
    print(f"{export_peft(model, output)}: read it with peft.PeftModel.from_pretrained")


def compare_command(model_size, seeds, epochs, output, assets=None, methods=(), learning_rates=()):
    """Train every method with every seed, except the runs that the file has already; print the table."""
    check_outputs(output)
    assets = assets or choose_assets("book")
    print(assets)
    chosen = choose_methods(methods) if methods else METHODS
    if learning_rates:
        chosen = [with_learning_rate(method, rate) for method in chosen for rate in learning_rates]
    runs = compare(
        assets, output, chosen, tuple(seeds), model_size, epochs,
        report=lambda line: print(line, flush=True),
    )
    print(summary(runs).to_string())


def memory_command(model, params=None, language_model=False, measure=False, **options):
    """Print how much memory a training step needs, from the size of the model.

    The model is a GPT-2 as chapter 4 prints it, or one with so many parameters; appendix-E/CHEATSHEET.md
    compares the estimates with measurements.
    """
    shape = shape_of(params) if params else GPT2_SHAPES[model]
    estimate = estimate_memory(shape, classes=None if language_model else 2, **options)
    print(f"{shape.layers} blocks, {shape.width} wide: {estimate.parameters:,} parameters, "
          f"{estimate.trained:,} train ({estimate.trained / estimate.parameters:.2%})")
    for name in ("weights", "optimizer", "gradients", "activations", "temporary", "scratch"):
        print(f"{name:<17}{getattr(estimate, name) / 1e6:>12,.1f} MB")
    print(f"peak of a step   {estimate.total / 1e6:>12,.1f} MB")
    if measure:
        tensors, whole = measure_in_this_process(shape, language_model, **options)
        print(f"measured: tensors{tensors / 1e6:>12,.1f} MB")
        print(f"the whole process{whole / 1e6:>12,.1f} MB" if whole else "")


def measure_in_this_process(shape, language_model, batch_size, tokens, gradient_checkpointing, **options):
    """Return `measure_step` of a random classifier; ValueError for what chapter 6's loop cannot train."""
    if language_model or gradient_checkpointing:
        raise ValueError("--measure trains chapter 6's classifier: leave out the other option")
    return measure_step(build_random_classifier(shape, **options), batch_size, tokens)


def choose_methods(words):
    """Return the `METHODS` with one of `words` in their titles; ValueError for a word that is in none."""
    titles = [method.title for method in METHODS]
    for word in words:
        if not word.strip() or not any(word in title for title in titles):
            raise ValueError(f"--methods: no title contains {word!r}; there are {titles}")
    return [method for method in METHODS if any(word in method.title for word in words)]


def with_learning_rate(method, rate):
    """Return `method` with another learning rate, which its title says."""
    settings = method.settings.with_training(learning_rate=rate)
    return replace(method, title=f"{method.title}, learning rate {rate:g}", settings=settings)


# The command line


def flag(*names, **options):
    """Return what argparse's `add_argument` takes; without a default, the command's own is kept."""
    return names, {"default": argparse.SUPPRESS, **options}


def output_flag(default):
    return flag("--output", type=Path, default=Path(default), help="file or folder to write")


ADAPTER_FLAG = flag("--adapter", type=Path, default=Path("adapter"), help="folder that a fine-tuning wrote")
MODEL_SIZE_FLAG = flag(
    "--model-size", choices=("124M", "355M", "774M", "1558M"), default="124M",
    help="which of OpenAI's models, if the assets say model=book",
)
COMMANDS = {  # name: its function and flags
    "finetune": (finetune_command, MODEL_SIZE_FLAG, output_flag("adapter")),
    "evaluate": (evaluate_command, ADAPTER_FLAG),
    "classify": (
        classify_command, ADAPTER_FLAG,
        flag("--json", action="store_true", dest="json_lines", help="print one line of JSON per message"),
        flag("messages", nargs="*", help="without any, each line of standard input is one"),
    ),
    "merge": (merge_command, ADAPTER_FLAG, output_flag("classifier.pth")),
    "export-peft": (export_command, ADAPTER_FLAG, output_flag("adapter-peft")),
    "compare": (
        compare_command, MODEL_SIZE_FLAG, output_flag("results/compare.jsonl"),
        flag("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run per method and seed"),
        flag("--epochs", type=int, default=5, help="passes over the training messages"),
        flag("--methods", nargs="+", help="only those with one of these words in their title"),
        flag("--learning-rates", type=float, nargs="+", help="train each method with each of these"),
    ),
    "memory": (
        memory_command,
        flag("--model", choices=GPT2_SHAPES, default="124M", help="a GPT-2 of this size"),
        flag("--params", type=float, help="another model, of about so many parameters, such as 7e9"),
        flag("--method", choices=WHAT_TRAINS, default="lora", help="what trains"),
        flag("--rank", type=int, default=16, help="columns of LoRA's A"),
        flag("--targets", nargs="+", choices=BODY, default=BODY, help="layers that get LoRA"),
        flag("--base-dtype", choices=BYTES, default="float32", help="of the frozen weights"),
        flag("--batch-size", type=int, default=8, help="texts per step"),
        flag("--tokens", type=int, default=120, help="tokens in each text"),
        flag("--language-model", action="store_true", default=False, help="predict every next token"),
        flag("--fused-attention", action="store_true", default=False, help="torch's attention kernel"),
        flag("--gradient-checkpointing", action="store_true", default=False, help="recompute activations"),
        flag("--measure", action="store_true", default=False, help="also take a real step on this CPU"),
    ),
}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (function, *flags) in COMMANDS.items():
        text = inspect.getdoc(function)
        title = text.partition("\n")[0]
        sub = commands.add_parser(name, help=title, description=text, formatter_class=HelpFormatter)
        sub.set_defaults(command=function)
        for names, options in flags:
            sub.add_argument(*names, **options)
    for name in ("finetune", "compare"):
        add_assets_flag(commands.choices[name])
    add_flags(commands.choices["finetune"], LoRASettings())
    add_flags(commands.choices["finetune"], TrainingSettings())
    return parser


@command
def main(arguments=None):
    """Run one command, see --help."""
    options = vars(build_parser().parse_args(arguments))
    options.pop("command")(**options)


if __name__ == "__main__":
    main()
