"""Compare the fast path's accuracy with the printed loop's: gpt2-tiny, the same messages, several seeds.

Both train LoRA as printed: rank and alpha 16 in every layer including the head, learning rate 5e-5, five
epochs. The printed loop pads to the longest message, reads the answer at the last position and keeps its
learning rate; the fast path reads the last real token, and its learning rate falls to zero.
"""

import time
from contextlib import redirect_stdout
from io import StringIO

import torch
from torch.utils.data import TensorDataset

from ch06 import calc_accuracy_loader, cut_or_pad
from finetune_spam import make_loaders, train_with_lora
from spam_classifier.classifier import PRINTED, accuracies, build_classifier, finetune


def padded_loaders(encoded, training):
    """Return chapter 6's loaders by name, every message as long as the longest one of training."""
    width = max(map(len, encoded["train"][0]))
    datasets = {}
    for name, (messages, labels) in encoded.items():
        rows = [cut_or_pad(ids.tolist(), width) for ids in messages]
        datasets[name] = TensorDataset(torch.tensor(rows), labels)
    return make_loaders(datasets, training.batch_size, training.seed)


def run_printed_loop(model, encoded, training, device):
    """Train with appendix E's loop; return the test accuracy, 0 to 1, and the seconds of training."""
    loaders = padded_loaders(encoded, training)
    with redirect_stdout(StringIO()):  # losses and accuracies of every epoch
        curves = train_with_lora(
            model.to(device), loaders, device, epochs=training.epochs, seed=training.seed,
            learning_rate=training.learning_rate, weight_decay=training.weight_decay,
        )
    return calc_accuracy_loader(loaders["test"], model, device), curves["training_seconds"]


def run_fast_path(model, encoded, training, device):
    """Return the same two numbers for training and evaluation on the fast path."""
    history = finetune(model, encoded, training, device)
    return accuracies(model, {"test": encoded["test"]}, device)["test"], history.seconds


def compare_accuracy(encoded, device, seeds, epochs=5, size="tiny", report=print):
    """Return one dictionary per seed: test accuracies and seconds of "book" and "ours"."""
    runs = []
    began = time.perf_counter()
    for seed in seeds:
        settings = PRINTED.with_training(seed=seed, epochs=epochs, progress=False)
        run = {"seed": seed}
        for name, train in (("book", run_printed_loop), ("ours", run_fast_path)):
            model = settings.adapt(build_classifier(size, seed)[0])
            run[name], run[f"{name}_seconds"] = train(model, encoded, settings.training, device)
        runs.append(run)
        report(f"{time.perf_counter() - began:.0f} s: seed {seed}, {run['book']:.2%} and {run['ours']:.2%}")
    return runs
