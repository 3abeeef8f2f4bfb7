"""Comparing ways to fine-tune: LoRA of several ranks and places, the last layer, the last block, all weights.

`compare` trains every method with every seed, adds one line of JSON per finished run to a file and
skips the runs that the file contains already, so that an interrupted comparison resumes where it stopped
and several processes can share one file.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import pandas as pd
from filelock import FileLock
from safetensors.torch import save

from appendix_e import count_parameters
from book_assets import get_tokenizer
from book_assets.files import append_line, check_outputs
from ch04 import pick_device
from ch06 import SPLITS, unfreeze_last_block
from fast_path.memory import peak_memory, peak_of_allocations
from fast_path.packed_model import last_token_logits
from fast_path.training import fit, prepare
from lora.adapters import copy_to_cpu
from lora.optimizer import lora_adamw
from spam_classifier.classifier import (
    PRINTED,
    LoRASettings,
    accuracies,
    build_classifier,
    context_length,
    encode_splits,
    finetune,
    load_splits,
)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: what is trained, and with which settings."""

    title: str
    kind: str  # lora, layer, block or full
    settings: LoRASettings
    pretrained: bool = True


def at_rate(learning_rate, **lora):
    """Return `LoRASettings` with AdamW's `learning_rate` and the fields `lora`."""
    return LoRASettings(**lora).with_training(learning_rate=learning_rate)


METHODS = (
    Method("LoRA as printed, rank 16", "lora", PRINTED),
    *(
        Method(f"LoRA, all layers, rank {rank}", "lora", at_rate(1e-4, rank=rank))
        for rank in (1, 2, 4, 8, 16, 32)
    ),
    Method(
        "LoRA, query and value, rank 16", "lora",
        at_rate(1e-4, targets=("query", "value")),
    ),
    Method("last layer", "layer", at_rate(5e-3)),
    Method("last block", "block", at_rate(2e-4)),
    Method("all weights", "full", at_rate(1e-4)),
    Method("LoRA as printed, random weights", "lora", PRINTED, pretrained=False),
)


def choose_parameters(model, method):
    """Freeze `model`, in place, except for what `method` trains."""
    if method.kind == "lora":
        method.settings.adapt(model)
    elif method.kind == "layer":
        model.requires_grad_(False)
        model.out_head.requires_grad_(True)
    elif method.kind == "block":
        unfreeze_last_block(model)
    else:
        model.requires_grad_(True)


# One run

MEASURED = (  # by `run_method`, as numbers
    "trained_parameters", "total_parameters", "checkpoint_bytes", "seconds_per_step",
    "final_loss", *SPLITS,
)


def build_model(method, size, device):
    """Return a classifier of GPT-2 `size`, ready for `fit`, in which `method`'s parameters train."""
    training = method.settings.training
    model, _ = build_classifier(size, training.seed, method.pretrained)
    choose_parameters(model, method)
    return prepare(model, training, device)


def checkpoint_bytes(model):
    """Return the size in bytes of a safetensors file of the trained parameters alone."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return len(save({name: copy_to_cpu(p) for name, p in trained.items()}))


def step_memory(model, encoded, settings, device, forward=last_token_logits):
    """Return the peak bytes of a training step on the longest messages, None on MPS.

    They hold weights, gradients, optimizer state, activations and scratch. On CUDA it is torch's own
    count, on a CPU the running sum of the allocations that the profiler sees. The step trains
    `model`: build one for this alone. `forward` is that of `fit`.
    """
    messages, labels = encoded["train"]
    order = sorted(range(len(messages)), key=lambda i: -len(messages[i]))
    longest = order[: settings.batch_size]
    batch = [messages[i] for i in longest], labels[longest]
    once = replace(settings, epochs=1, progress=False)

    def step():
        fit(model, batch, once, device, make_optimizer=lora_adamw, forward=forward)

    return peak_of_step(model, step, device)


def peak_of_step(model, step, device):
    """Return the peak bytes while `step()` trains `model`, its weights included; None on MPS."""
    if device.type == "mps":
        return None
    if device.type == "cuda":
        return peak_memory(step, device)
    tensors = [*model.parameters(), *model.buffers()]
    resident = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return resident + peak_of_allocations(step)


def run_method(method, size, encoded, device):
    """Fine-tune a new model once; return the run's metrics, a JSON-serialisable dictionary."""
    training = method.settings.training
    memory = step_memory(build_model(method, size, device), encoded, training, device)
    model = build_model(method, size, device)
    trained, total = count_parameters(model)
    size_on_disk = checkpoint_bytes(model)
    history = finetune(model, {"train": encoded["train"]}, training, device)
    return {
        "trained_parameters": trained,
        "total_parameters": total,
        "checkpoint_bytes": size_on_disk,
        "seconds_per_step": history.seconds / len(history.losses),
        "step_memory_bytes": memory,
        "final_loss": history.losses[-1],
        **accuracies(model, encoded, device),
    }


# All runs


def compare(
    choice, output, methods=METHODS, seeds=(1, 2, 3), size="124M", epochs=5, device=None,
    quick=False, report=print,
):
    """Train every method with every seed and return a DataFrame, one row per run.

    Each finished run is added to the file `output`, one line of JSON per run; a run that the file
    contains already, with the same method, seed, model, data and epochs, is not repeated. `report` is
    called with a line of text for each new run. Raises ValueError for seeds or methods that are none or
    occur twice, and what `read_runs` raises.
    """
    check_outputs(output)
    device, size = device or pick_device(), choice.model_size(size)
    data = choice.data + (", few messages" if quick else "")
    methods = plan_runs([*methods], [*seeds], epochs)
    about = {"model": size, "data": data}
    keys = [about | json.loads(json.dumps(asdict(each))) for each in methods]
    encoded = None  # until a run is missing
    for method, key in zip(methods, keys):
        if find_run(read_runs(output), key):  # it may be another process's
            continue
        encoded = encoded or load_encoded(choice, size, quick)
        title = f"{method.title}, seed {method.settings.training.seed}"
        try:
            run = key | run_method(method, size, encoded, device)
        except ValueError as error:
            raise ValueError(f"{title}: {error}") from error
        append_line(output, json.dumps(run, allow_nan=False))
        report(f"{title}: test accuracy {run['test']:.2%}")
    runs = read_runs(output)
    table = [find_run(runs, key) for key in keys]
    return pd.json_normalize(table)  # settings.rank, settings.training.seed, …


def plan_runs(methods, seeds, epochs):
    """Return the methods with each seed and `epochs` in their settings, seed by seed."""
    titles = [method.title for method in methods]
    for name, values in (("seeds", seeds), ("methods", titles)):
        if not values or len({*values}) < len(values):
            raise ValueError(f"{name} must be some, each of them once, not {values}")
    changes = {"epochs": epochs, "progress": False}
    return [
        replace(method, settings=method.settings.with_training(seed=seed, **changes))
        for seed, method in product(seeds, methods)
    ]


def find_run(runs, key):
    """Return the first of `runs` with all items of `key`, None if there is none."""
    return next((run for run in runs if key.items() <= run.items()), None)


def load_encoded(choice, size, quick):
    """Return `encode_splits` of the messages of `choice`, cut to the context of GPT-2 `size`."""
    max_tokens = context_length(build_classifier(size)[0])
    return encode_splits(load_splits(choice, quick), get_tokenizer(), max_tokens)


def read_runs(path):
    """Return the runs of a file that `compare` wrote, [] if there is none.

    Raises ValueError, with its number, for a line that is not a run: not JSON, cut off, without one of
    the fields or with a measurement that is not finite.
    """
    if not Path(path).exists():
        return []
    with FileLock(f"{path}.lock"):  # not within another process's line
        lines = Path(path).read_bytes().splitlines()
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            runs.append(check_run(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a finished run ({error}): delete this line, "
                "and compare will train that run again"
            ) from None
    return runs


def check_run(run):
    """Return `run`, a dictionary with every field; raise TypeError or ValueError for anything else."""
    of_method = {each.name for each in fields(Method)}
    names = {"model", "data", *of_method, "step_memory_bytes", *MEASURED}
    if missing := sorted(names - {*run}):
        raise ValueError(f"it lacks {', '.join(missing[:3])}")
    for name in MEASURED:
        if not math.isfinite(run[name]):
            raise ValueError(f"{name} is {run[name]}")
    return run


# Results


def summary(runs):
    """Return a DataFrame of texts, one row per method: costs, and accuracies in percent.

    Accuracies are means and standard deviations of the seeds (n - 1 in the denominator), seconds and
    memory are medians.
    """
    rows = {}
    for title, group in runs.groupby("title", sort=False):
        first = group.iloc[0]
        memory = group["step_memory_bytes"].median()
        rows[title] = {
            "trained": f"{first['trained_parameters']:,}",
            "checkpoint (MB)": f"{first['checkpoint_bytes'] / 1e6:,.3f}",
            "s/step": f"{group['seconds_per_step'].median():.3f}",
            "step memory (MB)": "" if pd.isna(memory) else f"{memory / 1e6:,.0f}",
            **{f"{split} (%)": mean_and_spread(100 * group[split]) for split in SPLITS},
        }
    return pd.DataFrame(rows).T


def mean_and_spread(values, digits=1):
    """Return a text such as "96.2 ± 0.8", or the mean alone for one value."""
    spread = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"
