"""Is the fast path as accurate as the printed loop? gpt2-tiny on the same messages, seed by seed.

Both train LoRA as printed: rank and alpha 16 in every layer, the head included, learning rate 5e-5, five
epochs. The printed loop pads to the longest message, reads the answer off the last position and keeps its
learning rate; `fast_training` reads the last real token, and its learning rate falls to zero.
"""

import time
from contextlib import redirect_stdout
from io import StringIO

import torch
from torch.utils.data import TensorDataset

from appendix_e import make_loaders, train_with_lora
from ch06 import calc_accuracy_loader, cut_or_pad
from spam_classifier.classifier import accuracies, build_classifier, finetune
from spam_classifier.experiments import METHODS, prepared

METHOD = METHODS[0]  # LoRA as printed, rank 16


def padded_loaders(split, settings):
    """Return chapter 6's loaders by name, every message as long as the longest one of training."""
    width = max(map(len, split["train"][0]))
    rows = {name: [cut_or_pad(ids.tolist(), width) for ids in part[0]] for name, part in split.items()}
    datasets = {name: TensorDataset(torch.tensor(rows[name]), part[1]) for name, part in split.items()}
    return make_loaders(datasets, settings.batch_size, settings.seed)


def printed_loop(settings, size, split, device):
    """Return the test accuracy, 0 to 1, of appendix E's own training, and its seconds."""
    model, _ = build_classifier(size, settings.seed)
    settings.adapt(model).to(device)
    loaders = padded_loaders(split, settings)
    with redirect_stdout(StringIO()):  # the log
        curves = train_with_lora(model, loaders, device, settings)
    return calc_accuracy_loader(loaders["test"], model, device), curves["training_seconds"]


def fast_path(settings, size, split, device):
    """Return the same two numbers for `fast_training`."""
    model = prepared(METHOD, settings, size, device)
    history = finetune(model, split, settings, device, progress=False)
    return accuracies(model, split, device)["test"], history.seconds


def compare_accuracy(split, device, seeds, epochs=5, size="tiny", report=print):
    """Return a list with a dictionary a seed: test accuracies and seconds of "book" and "ours"."""
    runs, began = [], time.perf_counter()
    for seed in seeds:
        settings, run = METHOD.settings(seed=seed, epochs=epochs), {"seed": seed}
        for name, train in (("book", printed_loop), ("ours", fast_path)):
            run[name], run[f"{name}_seconds"] = train(settings, size, split, device)
        runs.append(run)
        report(f"{time.perf_counter() - began:.0f} s: seed {seed}, {run['book']:.2%} and {run['ours']:.2%}")
    return runs
