"""Appendix E: low-rank adaptation (LoRA), and its main job, fine-tuning a spam classifier with it.

    python appendix-E/appendix_e.py --assets embedded --output-dir results

`appendix-E.ipynb` explains the same definitions one at a time. LoRA itself needs only torch: this file,
copied alone into another project, adapts that project's model. The main job uses chapters 4 to 6.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

SCALINGS = {
    "alpha": lambda alpha, rank: alpha,  # as printed
    "alpha/rank": lambda alpha, rank: alpha / rank,  # Hu et al. 2021; PEFT
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / rank**0.5,  # rsLoRA, 2023
}


# E.4 LoRA


def check_lora_options(rank, scaling, dropout, init):
    """Raise ValueError, saying which values are possible, for one that is not."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if scaling not in SCALINGS:
        known = ", ".join(SCALINGS)
        raise ValueError(f"scaling must be one of {known}, not {scaling!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if init not in ("printed", "paper"):
        raise ValueError(f"init must be 'printed' or 'paper', not {init!r}")


class LoRALayer(nn.Module):
    """scale · (x A B): x (…, in_dim) to (…, out_dim), with A (in_dim, rank) and B (rank, out_dim).

    B starts at zero, so the layer adds nothing until it is trained. Keywords, none of which changes
    what the listing does: `scaling`, one of SCALINGS; `dropout` on x in training; `init` of A, "printed"
    (uniform in ±1/√rank) or "paper" (±1/√in_dim, as in the paper's code); `device` and `dtype` of A, B.
    Raises ValueError for a rank below 1 or an unknown option. Source: listing E.5.
    """

    def __init__(
        self, in_dim, out_dim, rank, alpha, *, scaling="alpha",
        dropout=0.0, init="printed", device=None, dtype=None,
    ):
        super().__init__()
        check_lora_options(rank, scaling, dropout, init)
        self.rank, self.alpha, self.scaling = rank, alpha, scaling
        self.dropout, self.init = dropout, init
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        drawn = self.A if init == "printed" else self.A.detach().T
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))  # ±1/√(last size)
        self.to(device=device, dtype=dtype)  # the same draw on every device

    @property
    def scale(self):
        return SCALINGS[self.scaling](self.alpha, self.rank)

    def forward(self, x):
        kept = nn.functional.dropout(x, self.dropout, self.training)
        low = kept.to(self.A.dtype) @ self.A  # (…, rank)
        return (self.scale * (low @ self.B)).to(x.dtype)


class LinearWithLoRA(nn.Module):
    """linear(x) + lora(x): the layer as it was, and a `LoRALayer` beside it on the same device.

    `options` are LoRALayer's keywords; A and B take the linear's dtype if none is given. `weight`, for
    code that reads it instead of calling the layer, is W + scale · (A B)ᵀ, (out_features, in_features).
    Source: listing E.6.
    """

    def __init__(self, linear, rank, alpha, **options):
        super().__init__()
        weight = linear.weight
        options = {"device": weight.device, "dtype": weight.dtype, **options}
        self.linear = linear
        self.lora = LoRALayer(
            linear.in_features, linear.out_features, rank, alpha, **options
        )
        self.train(linear.training)

    @property
    def weight(self):
        lora = self.lora
        return self.linear.weight + lora.scale * (lora.A @ lora.B).T

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def is_linear(path, module):
    """What `replace_linear_with_lora` adapts by default: every Linear layer, wherever it stands."""
    return isinstance(module, nn.Linear)


def replace_linear_with_lora(
    model, rank, alpha, *, select=is_linear, **options
):
    """Put a `LinearWithLoRA` in the place of every Linear layer, in place and at any depth of `model`.

    A layer that has LoRA already stays as it is; one that stands in two places stays one layer.
    `select(path, module)` may narrow the choice; `options` are LoRALayer's keywords.
    Raises ValueError, before any change, if `model` is itself a Linear or has none. Source: section E.4.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "a Linear cannot be replaced inside itself: "
            "use model = LinearWithLoRA(model, rank, alpha)"
        )
    places = []
    for path, module in model.named_modules(remove_duplicate=False):
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if select(path, module) and not isinstance(parent, LinearWithLoRA):
            places.append((parent, name, module))
    adapted = any(isinstance(m, LinearWithLoRA) for m in model.modules())
    if not places and not adapted:
        raise ValueError(
            f"no Linear layer to adapt in {type(model).__name__}: "
            "take a model that has some, or a wider select"
        )
    layers = dict.fromkeys(linear for _, _, linear in places)  # shared: once
    for linear in layers:
        layers[linear] = LinearWithLoRA(linear, rank, alpha, **options)
    for parent, name, linear in places:
        setattr(parent, name, layers[linear])


def freeze(model):
    """Stop training every parameter of `model` (layers put in later train as usual)."""
    for param in model.parameters():
        param.requires_grad = False


def count_parameters(model):
    """Return (trainable, total) numbers of parameters; shared ones count once."""
    params = list(model.parameters())
    trainable = sum(p.numel() for p in params if p.requires_grad)
    return trainable, sum(p.numel() for p in params)


# The main job: the notebook's steps in one command


def load_pretrained(choice):
    """Return (model, configuration) of `choice.model`: GPT-2 124M ("book") or tiny ("embedded")."""
    from ch04 import GPTModel
    from ch05 import config_from_settings, load_weights_into_gpt
    from gpt_download import download_and_load_gpt2

    size = {"book": "124M", "embedded": "tiny"}[choice.model]
    settings, params = download_and_load_gpt2(model_size=size, models_dir="gpt2")
    config = config_from_settings(settings)
    model = GPTModel(config)
    load_weights_into_gpt(model, params)
    return model, config


def prepare_datasets(choice, context_length, folder):
    """Write train.csv, validation.csv, test.csv into `folder`; return their `ch06.SpamDataset`s by name.

    Messages are cut to the training part's longest, or to `context_length` tokens if that is less.
    """
    from book_assets import get_tokenizer
    from ch06 import LABELS, SpamDataset, create_balanced_dataset, load_messages, random_split

    messages = create_balanced_dataset(load_messages(choice))
    messages["Label"] = messages["Label"].map(LABELS)
    parts = random_split(messages, 0.7, 0.1)
    tokenizer, max_length, datasets = get_tokenizer(), None, {}
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        file = folder / f"{name}.csv"
        part.to_csv(file, index=None)
        datasets[name] = SpamDataset(file, tokenizer, max_length)
        if datasets[name].max_length > context_length:
            datasets[name] = SpamDataset(file, tokenizer, context_length)
        max_length = datasets[name].max_length
    return datasets


def make_loaders(datasets, batch_size, seed):
    """Return a DataLoader for each dataset by name; only "train" is shuffled and drops its last batch."""
    from torch.utils.data import DataLoader

    torch.manual_seed(seed)
    return {
        name: DataLoader(dataset, batch_size, shuffle=name == "train", drop_last=name == "train")
        for name, dataset in datasets.items()
    }


def accuracy_by_part(model, loaders, device, num_batches=None):
    """Return by name the accuracy, 0 to 1, on `num_batches` batches of each loader (None: all)."""
    from ch06 import calc_accuracy_loader

    return {
        name: calc_accuracy_loader(loader, model, device, num_batches) for name, loader in loaders.items()
    }


def put_lora_in(model, args):
    """Freeze `model`, put LoRA layers into it, and print how many parameters are trained after each step."""
    print(f"Trainable parameters: {count_parameters(model)[0]:,}", end="")
    freeze(model)
    print(f" → frozen: {count_parameters(model)[0]:,}", end="")
    replace_linear_with_lora(model, args.rank, args.alpha, scaling=args.scaling)
    print(f" → LoRA of rank {args.rank}: {count_parameters(model)[0]:,}", flush=True)


def train_with_lora(model, loaders, device, args):
    """Run listing E.7's training; return its curves by name and the seconds that it took."""
    from ch06 import train_classifier_simple

    start = time.perf_counter()
    torch.manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    results = train_classifier_simple(
        model, loaders["train"], loaders["validation"], optimizer, device,
        num_epochs=args.epochs, eval_freq=50, eval_iter=5, progress=sys.stderr.isatty(),
    )
    names = ("train_losses", "val_losses", "train_accs", "val_accs", "examples_seen")
    curves = dict(zip(names, results, strict=True))
    return curves | {"training_seconds": round(time.perf_counter() - start, 1)}


def save_plots(curves, epochs, folder):
    """Write loss.png and accuracy.png into `folder` and return their paths."""
    from ch06 import plot_values

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


def run_main_job(choice, args):
    """Do the main job on the `choice` of assets; write only into args.output_dir."""
    from ch04 import pick_device
    from ch06 import add_classification_head

    start, device, folder = time.perf_counter(), pick_device(), args.output_dir
    print(choice)
    folder.mkdir(parents=True, exist_ok=True)
    model, config = load_pretrained(choice)
    datasets = prepare_datasets(choice, config["context_length"], folder)
    counts = ", ".join(f"{len(dataset)} {name}" for name, dataset in datasets.items())
    print(f"Messages: {counts}, of {datasets['train'].max_length} tokens; device: {device}")
    loaders = make_loaders(datasets, args.batch_size, args.seed)
    torch.manual_seed(args.seed)
    add_classification_head(model, num_classes=2).to(device)
    torch.manual_seed(args.seed)
    before = accuracy_by_part(model, loaders, device, num_batches=10)
    put_lora_in(model, args)
    curves = train_with_lora(model, loaders, device, args)
    after = accuracy_by_part(model, loaders, device)
    print("", accuracy_table({"before (10 batches)": before, "after (all)": after}), "", sep="\n")
    results = {
        "assets": str(choice), "settings": {**vars(args), "output_dir": str(folder)},
        "accuracy_before": before, "accuracy_after": after, **curves,
        "seconds": round(time.perf_counter() - start, 1), "machine": describe_machine(device),
    }
    paths = [*save_plots(curves, args.epochs, folder), folder / "results.json"]
    paths[-1].write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"{results['seconds']} s, of these {curves['training_seconds']} s training. Written:")
    print(*(f"  {path}" for path in paths), sep="\n")


def main_job_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description="Fine-tune a GPT-2 with LoRA to tell spam from other messages (appendix E).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--assets", default=os.environ.get("LLM_ASSETS") or "book",
        help="book (OpenAI's 124M weights, UCI's messages), embedded, or e.g. model=embedded,data=book",
    )
    parser.add_argument("--epochs", type=int, default=5, help="times through the training messages")
    parser.add_argument("--rank", type=int, default=16, help="columns of A, rows of B")
    parser.add_argument("--alpha", type=float, default=16.0, help="weight of the LoRA layers")
    parser.add_argument("--scaling", choices=SCALINGS, default="alpha", help="the factor of x A B")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="AdamW's")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="AdamW's")
    parser.add_argument("--batch-size", type=int, default=8, help="messages a step")
    parser.add_argument("--seed", type=int, default=123, help="of shuffling, head and LoRA layers")
    parser.add_argument("--output-dir", type=Path, default=Path("results"), help="for all that is written")
    args = parser.parse_args(arguments)
    for name in ("epochs", "rank", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(arguments=None):
    """The command line, see --help. What the reader can mend ends it with a message, no traceback."""
    args = main_job_arguments(arguments)
    os.environ["LLM_ASSETS"] = args.assets
    try:
        from book_assets import choose_assets
        from book_downloads import DownloadError

        choice = choose_assets()
    except ModuleNotFoundError as error:
        sys.exit(f"{error}. `python setup/run_main.py` installs what this needs, then runs it.")
    except ValueError as error:
        sys.exit(f"--assets: {error}")
    try:
        run_main_job(choice, args)
    except DownloadError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
