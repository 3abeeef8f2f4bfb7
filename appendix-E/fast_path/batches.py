"""From messages to batches: similar lengths together, few enough tokens at once, padded.

Shapes in comments: B messages, T tokens in the longest one, N messages in all.
"""

import math

import numpy as np
import torch


def length_batches(lengths, batch_size, seed, bucket=4):
    """Return index arrays (B,) that cover `lengths` (N,) once, messages of similar length together.

    The messages are shuffled, cut into buckets of `bucket` batches, sorted by length within each bucket,
    and the batches shuffled again: the composition and order of batches depend on `seed`, one number or
    several (a training takes its own seed and the epoch, so that no two seeds share an order).
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    lengths = np.asarray(lengths)
    size = bucket * batch_size
    buckets = [order[start : start + size] for start in range(0, len(order), size)]
    buckets = [indices[np.argsort(lengths[indices], kind="stable")] for indices in buckets]
    batches = [b[start : start + batch_size] for b in buckets for start in range(0, len(b), batch_size)]
    return [batches[number] for number in rng.permutation(len(batches))]


def split_batch(encoded, indices, bound):
    """Return `indices` (B,) cut into the fewest equal parts of at most about `bound` tokens each.

    `encoded` contains the token ids (T,) of every message.
    """
    tokens = sum(len(encoded[index]) for index in indices)
    return np.array_split(indices, min(len(indices), max(1, math.ceil(tokens / bound))))


def tokens_at_once(settings, device, training):
    """Return `settings.max_tokens`, or the number of tokens per call beyond which `device` is no faster."""
    on_cpu = 512 if training else 1024
    return settings.max_tokens or (on_cpu if device.type == "cpu" else math.inf)


def pad_batch(encoded, indices, device):
    """Return ids (B, T), right-padded with 0, and lengths (B,) of the chosen messages on `device`."""
    lengths = np.array([len(encoded[index]) for index in indices])
    ids = np.zeros((len(indices), lengths.max()), dtype=np.int64)
    for row, index in zip(ids, indices):
        row[: len(encoded[index])] = encoded[index]
    return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)
