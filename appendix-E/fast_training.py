"""The classifier's training and evaluation as fast as the machine allows, with the same weights.

The printed loop pads every message to 120 tokens and reads the answer off a padding token. Here the
real tokens of a batch are laid end to end (`packed_model`), and the answer is read at the last real
token, which no padding can change. The model is chapter 4's, adapted by appendix E or not; only the
order of computing differs. Shapes in comments: B messages, T the longest one's tokens.
"""

import ctypes
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ch04 import MultiHeadAttention
from packed_model import last_token_logits

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class FastSettings:
    """How `fit` and `predict` run. `precision` "auto" asks the hardware; see `choose_precision`.

    `accumulate` batches make one optimizer step. About `max_tokens` tokens are computed at once: a
    longer batch is split, with the same gradient and less memory; None is, on a CPU, 512 in training
    and 1024 in evaluation, and no bound elsewhere. Messages are sorted by length within `pool`
    batches (see `length_batches`). With `decay` the learning rate falls linearly to zero. `compile`
    hands the forward pass to torch.compile: a minute of warm-up, and a C++ compiler on a CPU.
    Raises ValueError for a count below 1.
    """

    epochs: int = 5
    batch_size: int = 8
    learning_rate: float = 5e-5
    decay: bool = True
    weight_decay: float = 0.1
    seed: int = 123
    pool: int = 4
    precision: str = "auto"
    fused_attention: bool = True
    compile: bool = False
    gradient_checkpointing: bool = False
    accumulate: int = 1
    eval_batch_size: int = 64
    max_tokens: int | None = None
    progress: bool = True

    def __post_init__(self):
        for name in ("epochs", "batch_size", "pool", "accumulate", "eval_batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass
class History:
    """Mean loss of every step, validation accuracy (0 to 1) of every epoch, seconds, share spent on data."""

    losses: list = field(default_factory=list)
    accuracies: list = field(default_factory=list)
    seconds: float = 0.0
    data_share: float = 0.0


# Messages to batches


def encode_messages(texts, tokenizer, max_tokens):
    """Return the token ids of every text, int32 arrays cut to `max_tokens`.

    Raises ValueError for a text without tokens: there is no last token to read.
    """
    encoded = [tokenizer.encode(text, disallowed_special=())[:max_tokens] for text in texts]
    for number, ids in enumerate(encoded):
        if len(ids) == 0:
            raise ValueError(f"message {number} is empty: drop it, there is nothing to classify")
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def length_batches(lengths, batch_size, seed, pool=4):
    """Return index arrays that cover `lengths` once, messages of similar length together.

    The messages are shuffled, cut into pools of `pool` batches, sorted by length within each pool, and
    the batches shuffled again: who meets whom, and when, changes with `seed`.
    """
    rng = np.random.default_rng(seed)
    order, lengths = rng.permutation(len(lengths)), np.asarray(lengths)
    size = pool * batch_size
    pools = [order[start : start + size] for start in range(0, len(order), size)]
    pools = [indices[np.argsort(lengths[indices], kind="stable")] for indices in pools]
    batches = [p[start : start + batch_size] for p in pools for start in range(0, len(p), batch_size)]
    return [batches[number] for number in rng.permutation(len(batches))]


def split(encoded, indices, bound):
    """Cut a batch into the fewest equal parts that have about `bound` tokens at most."""
    tokens = sum(len(encoded[index]) for index in indices)
    return np.array_split(indices, min(len(indices), max(1, math.ceil(tokens / bound))))


def tokens_at_once(settings, device, training):
    """Return `settings.max_tokens`, or what was fastest: more are no faster and take more memory."""
    on_cpu = 512 if training else 1024
    return settings.max_tokens or (on_cpu if device.type == "cpu" else math.inf)


def padded(encoded, indices, device):
    """Return ids (B, T), right-padded with 0, and lengths (B,), of the chosen messages."""
    lengths = np.array([len(encoded[index]) for index in indices])
    ids = np.zeros((len(indices), lengths.max()), dtype=np.int64)
    for row, index in zip(ids, indices):
        row[: len(encoded[index])] = encoded[index]
    return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)


# Precision and memory


def choose_precision(device, wanted="auto"):
    """Return "float32", "bf16" or "fp16": `wanted`, or what `device` computes fastest without harm.

    bf16 where the processor has instructions for it (without, a product is 50 to 100 times slower than
    in float32), fp16 on older CUDA cards, float32 elsewhere. Raises ValueError for another name.
    """
    if wanted != "auto":
        if wanted not in PRECISIONS:
            raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, not {wanted!r}")
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    if device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return "bf16"
    return "float32"


def autocast(device, precision):
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def keep_freed_memory():
    """Let glibc keep freed buffers for the next step instead of mapping new pages: True if it agreed.

    Elsewhere than on Linux with glibc nothing happens. Holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def prepare(model, settings, device):
    """Move the model to `device`, choose its attention, store frozen weights in the chosen precision.

    On a CPU weights are laid out by input: same shapes and values, and a product with one token, as in
    generation, reads memory 1.4 times as fast. `fit` and `predict` take the model from here; `restore`
    makes it one for all other code. Returns the same model.
    """
    dtype = PRECISIONS[choose_precision(device, settings.precision)]
    model.to(device)
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.fused = settings.fused_attention
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if frozen and isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to(dtype)
        if isinstance(module, torch.nn.Linear) and device.type == "cpu":
            module.weight.data = module.weight.data.t().contiguous().t()
    return model


def restore(model):
    """Store every weight in float32 and in rows, in place: undo what `prepare` does to them.

    Values that were rounded stay rounded. Returns the same model.
    """
    for parameter in model.float().parameters():
        parameter.data = parameter.data.contiguous()
    return model


def stored_precision(model):
    """Return "bf16" or "fp16" if any weight of `model` is stored in that, else None."""
    stored = {parameter.dtype for parameter in model.parameters()}
    return next((name for name in ("bf16", "fp16") if PRECISIONS[name] in stored), None)


# Training and prediction


def fit(model, train, validation, settings, device):
    """Train what requires a gradient with AdamW on `train`, a pair (encoded messages, labels).

    `model` comes from `prepare`. The validation pair is classified after every epoch. Returns a `History`.
    Raises ValueError for a part without messages or with more or fewer labels than messages.
    """
    train, validation = (checked(*part) for part in (train, validation))
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    start, history = time.perf_counter(), History()
    run = TrainingRun(model, settings, device, history)
    bar = tqdm(range(settings.epochs), "epochs", disable=not settings.progress, leave=False)
    for epoch in bar:
        run.epoch(*train, seed=settings.seed + epoch)
        encoded, labels = validation
        guesses = predict(model, encoded, device, settings).argmax(dim=1)
        history.accuracies.append((guesses == labels).float().mean().item())
        bar.set_postfix(loss=f"{history.losses[-1]:.3f}", accuracy=f"{history.accuracies[-1]:.1%}")
    history.seconds = time.perf_counter() - start
    history.data_share = run.data_seconds / history.seconds
    return history


def checked(encoded, labels):
    """Return the messages and their labels, (N,) int64 on the CPU, or raise ValueError."""
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    if len(encoded) == 0 or len(encoded) != len(labels):
        counts = f"{len(encoded)} messages and {len(labels)} labels"
        raise ValueError(f"{counts}: need one label for each, and some messages")
    return encoded, labels


class TrainingRun:
    """The optimizer and scaler of one `fit`, and its passes over the data."""

    def __init__(self, model, settings, device, history):
        self.model, self.settings, self.device, self.history = model, settings, device, history
        self.precision = choose_precision(device, settings.precision)
        self.forward = last_token_logits
        if settings.compile:
            self.forward = torch.compile(last_token_logits, dynamic=True)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=settings.learning_rate, weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        fp16 = self.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=fp16)
        self.data_seconds, self.done, self.steps = 0.0, 0, 1

    def epoch(self, encoded, labels, seed):
        self.model.train()
        lengths, settings = [len(ids) for ids in encoded], self.settings
        batches = length_batches(lengths, settings.batch_size, seed, settings.pool)
        groups = range(0, len(batches), settings.accumulate)
        self.steps = settings.epochs * len(groups)
        losses = [
            self.step(encoded, labels, batches[start : start + settings.accumulate])
            for start in groups
        ]
        self.history.losses += torch.stack(losses).tolist()  # one wait for all of them

    def step(self, encoded, labels, batches):
        """One optimizer step on the mean loss of the messages in `batches`, which is returned, ()."""
        count, total = sum(len(indices) for indices in batches), 0.0
        bound = tokens_at_once(self.settings, self.device, training=True)
        parts = (split(encoded, indices, bound) for indices in batches)
        for indices in chain.from_iterable(parts):
            began = time.perf_counter()
            ids, lengths = padded(encoded, indices, self.device)
            targets = labels[indices].to(self.device)
            self.data_seconds += time.perf_counter() - began
            total = total + self.backward(ids, lengths, targets, count)
        if self.settings.decay:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * (1 - self.done / self.steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.done += 1
        return total

    def backward(self, ids, lengths, targets, count):
        with autocast(self.device, self.precision):
            logits = self.forward(self.model, ids, lengths, self.settings.gradient_checkpointing)
        loss = cross_entropy(logits.float(), targets, reduction="sum") / count
        self.scaler.scale(loss).backward()
        return loss.detach()


def predict(model, encoded, device, settings=FastSettings()):
    """Logits (N messages, classes), float32 on the CPU, at each message's last token; order kept.

    A model with weights in bf16 or fp16 is evaluated in that precision, another one in that of
    `settings`. Raises ValueError without messages.
    """
    if len(encoded) == 0:
        raise ValueError("there are no messages: encode some with encode_messages")
    precision = stored_precision(model) or choose_precision(device, settings.precision)
    order = np.argsort([-len(ids) for ids in encoded], kind="stable")  # the longest first
    size = settings.eval_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    bound = tokens_at_once(settings, device, training=False)
    parts = (split(encoded, indices, bound) for indices in batches)
    was_training, results = model.training, []
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            for indices in chain.from_iterable(parts):
                logits = last_token_logits(model, *padded(encoded, indices, device))
                results.append(logits.float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(results)[np.argsort(order)]
