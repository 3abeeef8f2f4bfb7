"""What LoRA buys: LoRA of several ranks and places against the last layer, the last block and all weights.

`compare` trains every method with every seed, appends a line of JSON for each finished run to a file and
leaves out what that file has already, so that an interrupted comparison goes on where it stopped.
"""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save

from appendix_e import count_parameters
from book_assets import get_tokenizer
from ch04 import pick_device
from ch06 import unfreeze_last_block
from fast_training import fit, prepare
from lora_adapters import stored, write_files
from lora_classifier import (
    LoRASettings,
    accuracies,
    balanced_messages,
    book_split,
    build_classifier,
    context_length,
    encode_split,
    finetune,
    model_size,
)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: what is trained, and the learning rate chosen for it on validation data."""

    title: str
    kind: str  # lora, layer, block or full
    learning_rate: float
    rank: int = 16
    targets: tuple = ("all",)
    train_in_full: tuple = ("head",)
    pretrained: bool = True

    def settings(self, **changes):
        wanted = {key: getattr(self, key) for key in ("rank", "targets", "train_in_full", "learning_rate")}
        return replace(LoRASettings(**wanted), **changes)


METHODS = (
    Method("LoRA as printed, rank 16", "lora", 5e-5, 16, train_in_full=()),
    *(Method(f"LoRA, all layers, rank {rank}", "lora", 1e-4, rank) for rank in (1, 2, 4, 8, 16, 32)),
    Method("LoRA, query and value, rank 16", "lora", 1e-4, 16, ("query", "value")),
    Method("last layer", "layer", 5e-3),
    Method("last block", "block", 2e-4),
    Method("all weights", "full", 1e-4),
    Method("LoRA as printed, random weights", "lora", 5e-5, 16, train_in_full=(), pretrained=False),
)


def choose_parameters(model, method, seed):
    """Freeze `model`, in place, but for what `method` trains."""
    if method.kind == "lora":
        method.settings(seed=seed).adapt(model)
    elif method.kind == "layer":
        model.requires_grad_(False)
        model.out_head.requires_grad_(True)
    elif method.kind == "block":
        unfreeze_last_block(model)
    else:
        model.requires_grad_(True)


# One run


def checkpoint_bytes(model):
    """Return the size of a safetensors file with the trained parameters alone."""
    return len(save({n: stored(p) for n, p in model.named_parameters() if p.requires_grad}))


def step_memory(model, split, settings, device):
    """Return the peak bytes of a training step on the longest messages: weights, gradients,
    optimizer state, activations and scratch.

    On CUDA torch's own count, elsewhere the running sum of the profiler's allocations in the
    process's memory (None on MPS). The step trains `model`: give one that is built for this.
    """
    encoded, labels = split["train"]
    longest = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))[: settings.batch_size]
    batch = [encoded[i] for i in longest], labels[longest]
    probe = [encoded[longest[-1]][:1]], labels[longest[-1:]]
    once = replace(settings.training(progress=False), epochs=1)
    if device.type == "mps":
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        fit(model, batch, probe, once, device)
        return torch.cuda.max_memory_allocated(device)
    tensors = [*model.parameters(), *model.buffers()]
    resident = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return resident + peak_of_allocations(lambda: fit(model, batch, probe, once, device))


def peak_of_allocations(function):
    """Return the most bytes of tensors that stand in CPU memory at once because of `function()`."""
    from torch.profiler import ProfilerActivity, profile

    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def quiet_stderr():
    """Drop what native code writes to standard error: the profiler greets there in some versions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def run_method(method, seed, size, split, device, epochs):
    """Fine-tune from the pretrained weights once and return what there is to know, ready for JSON."""
    settings = method.settings(seed=seed, epochs=epochs)
    model = prepared(method, settings, size, device)
    memory = step_memory(model, split, settings, device)
    model = prepared(method, settings, size, device)
    trained, total = count_parameters(model)
    size_on_disk = checkpoint_bytes(model)
    glance = {**split, "validation": tuple(part[:8] for part in split["validation"])}
    history = finetune(model, glance, settings, device, progress=False)  # timed nearly without validation
    return {
        "trained_parameters": trained, "total_parameters": total, "checkpoint_bytes": size_on_disk,
        "seconds_a_step": history.seconds / len(history.losses), "step_memory_bytes": memory,
        "final_loss": history.losses[-1], **accuracies(model, split, device),
    }


def prepared(method, settings, size, device):
    model, _ = build_classifier(size, settings.seed, method.pretrained)
    choose_parameters(model, method, settings.seed)
    return prepare(model, settings.training(), device)


# All runs


def compare(
    choice, output, methods=METHODS, seeds=(1, 2, 3), size=None, epochs=5, device=None, quick=False,
    report=print,
):
    """Train every method with every seed and return a DataFrame, a row a run.

    Each finished run is added to the file `output`, a line of JSON; one that stands there with the same
    method, seed, model, data and epochs is not repeated. `report` is called with a line for each new one.
    """
    device = device or pick_device()
    size, data = model_size(choice, size), choice.data + (", few messages" if quick else "")
    runs, split, wanted = read_runs(output), None, []
    for seed in seeds:
        for method in methods:
            key = {"model": size, "data": data, "epochs": epochs, "seed": seed, **asdict(method)}
            key = json.loads(json.dumps(key))  # tuples become lists, as in the file
            run = next((run for run in runs if key.items() <= run.items()), None)
            if run is None:
                split = split or encoded_messages(choice, size, quick)
                run = {**key, **run_method(method, seed, size, split, device, epochs)}
                runs.append(run)
                write_runs(output, runs)
                report(f"{method.title}, seed {seed}: {run['test']:.2%} of the test messages")
            wanted.append(run)
    return pd.DataFrame(wanted)


def encoded_messages(choice, size, quick):
    model, _ = build_classifier(size)
    parts = book_split(balanced_messages(choice), quick)
    return encode_split(parts, get_tokenizer(), context_length(model))


def read_runs(path):
    """Return the runs of a file that `write_runs` wrote, [] if there is none."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def write_runs(path, runs):
    """Write one line of JSON a run, under another name first: never a line cut off."""
    text = "".join(json.dumps(run) + "\n" for run in runs)
    write_files(Path(path).parent, {Path(path).name: text.encode()})


# What came out


def summary(runs):
    """Return a DataFrame of texts, a row a method: costs, and accuracies as mean ± standard deviation."""
    rows = {}
    for title, group in runs.groupby("title", sort=False):
        memory = group["step_memory_bytes"].median()
        rows[title] = {
            "trained": f"{group['trained_parameters'].iloc[0]:,}",
            "checkpoint": f"{group['checkpoint_bytes'].iloc[0] / 1e6:,.3f} MB",
            "s/step": f"{group['seconds_a_step'].median():.3f}",
            "step memory": "" if pd.isna(memory) else f"{memory / 1e6:,.0f} MB",
            **{part: mean_and_spread(group[part]) for part in ("train", "validation", "test")},
        }
    return pd.DataFrame(rows).T


def mean_and_spread(values):
    values = 100 * values
    return f"{values.mean():.1f} ± {values.std():.1f} %" if len(values) > 1 else f"{values.mean():.1f} %"


def plot_ranks(runs):
    """Return a Figure: test accuracy over the rank of LoRA in all layers, a dot a run, a line the mean."""
    import matplotlib.pyplot as plt

    runs = runs[runs["title"].str.startswith("LoRA, all layers")]
    fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ax.plot(runs["rank"], 100 * runs["test"], "o", alpha=0.5)
    ax.plot(100 * runs.groupby("rank")["test"].mean())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks := sorted(runs["rank"].unique()), map(str, ranks))
    ax.set(xlabel="rank", ylabel="test accuracy (%)")
    plt.close(fig)
    return fig


def plot_costs(runs):
    """Return a Figure: test accuracy over trained parameters, a point a method with its spread."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (title, group) in enumerate(runs.groupby("title", sort=False)):
        test, spread = 100 * group["test"].mean(), 100 * group["test"].std(ddof=0)
        marker = "osD^vP*X<>h"[number % 11]
        ax.errorbar(group["trained_parameters"].iloc[0], test, spread, marker=marker, ls="", label=title)
    ax.set(xlabel="trained parameters", ylabel="test accuracy (%)", xscale="log")
    ax.legend(fontsize="small", bbox_to_anchor=(1, 1))
    plt.close(fig)
    return fig
