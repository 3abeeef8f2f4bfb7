"""Train and evaluate the classifier several times faster than the printed loop: same model, same gradients.

The printed loop pads every message to the longest one and reads the answer at the last position, mostly
padding. Here the real tokens of a batch are laid end to end (`packed_model`), and the answer is read at
the last real token, which no padding can change. The model is chapter 4's, with or without LoRA.
Shapes in comments: B messages, T tokens in the longest one.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ch04 import use_fused_attention
from fast_path.batches import length_batches, pad_batch, split_batch, tokens_at_once
from fast_path.memory import keep_freed_memory
from fast_path.packed_model import last_token_logits
from fast_path.settings import PRECISIONS, TrainingSettings


@dataclass
class History:
    """Mean loss per step; validation accuracy, 0 to 1, per epoch if there was validation data; seconds."""

    losses: list = field(default_factory=list)
    accuracies: list = field(default_factory=list)
    seconds: float = 0.0

    def best_epoch(self):
        """Return the number, from 0 on, of the first epoch with the highest validation accuracy."""
        return int(np.argmax(self.accuracies))


# Precision


def choose_precision(device, wanted="auto"):
    """Return "float32", "bf16" or "fp16": `wanted`, or for "auto" the fastest that is safe on `device`.

    That is bf16 where the processor has instructions for it (without them a product takes 50 to 100 times
    as long as in float32), fp16 on older CUDA cards, float32 elsewhere. Raises ValueError for other names.
    """
    if wanted != "auto":
        if wanted not in PRECISIONS:
            raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, not {wanted!r}")
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "float32"


def cpu_has_bf16():
    """Return whether this processor has instructions for products in bf16 (AMX or AVX-512)."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)() for probe in probes)


def autocast(device, precision):
    """Return a context in which products run in `precision`, a key of `PRECISIONS`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def prepare(model, settings, device):
    """Move the model to `device`, choose its attention, store its weights for `fit`. Returns the same model.

    Frozen linear layers and embeddings are stored in the chosen precision, everything else in float32. A
    model with weights in bf16 or fp16 answers through the functions of this module alone: calling it
    raises ValueError until `restore`. On a CPU weights are stored by columns: same shapes and values, and
    a product with one token, as in generation, reads memory 1.4 times as fast.
    """
    dtype = PRECISIONS[choose_precision(device, settings.precision)]
    use_fused_attention(restore(model).to(device), settings.fused_attention)
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if frozen and isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to(dtype)
        stored = isinstance(module, torch.nn.Linear) and "weight" in module._parameters  # not quantized
        if stored and device.type == "cpu":
            module.weight.data = module.weight.data.t().contiguous().t()
    if stored_precision(model) != "float32":
        model.refusal = model.register_forward_pre_hook(refuse_low_precision)
    return model


def refuse_low_precision(model, inputs):
    """Raise ValueError, before `model` computes anything, if its weights are stored in bf16 or fp16."""
    if (precision := stored_precision(model)) != "float32":
        raise ValueError(
            f"this model is prepared for the fast path in {precision}: "
            "call fast_path.training.restore(model) first"
        )


def restore(model):
    """Store every weight in float32 and by rows again, in place, as before `prepare`.

    Values that were rounded stay rounded. Returns the same model.
    """
    if hasattr(model, "refusal"):
        model.refusal.remove()
        del model.refusal
    for parameter in model.float().parameters():
        parameter.data = parameter.data.contiguous()
    return model


def stored_precision(model):
    """Return "bf16" or "fp16" if any weight of `model` is stored in that, else "float32"."""
    stored = {parameter.dtype for parameter in model.parameters()}
    return next((name for name in ("bf16", "fp16") if PRECISIONS[name] in stored), "float32")


# Training and prediction


def fit(
    model, train, settings, device, validation=None, make_optimizer=None, *, forward=last_token_logits,
    keep_best=False,
):
    """Train what requires a gradient with AdamW on `train`, a pair (encoded messages, labels).

    `model` comes from `prepare`; the messages are arrays of token ids (T,), the labels integers (N,). If
    there is a `validation` pair, its accuracy is measured after every epoch; with `keep_best` the model ends
    with the weights of the first epoch whose accuracy was the highest. `make_optimizer`, called as `adamw`
    is, makes another optimizer; `forward`, called as `last_token_logits` is, computes the logits of another
    model than chapter 4's. Returns a `History`. Raises ValueError for a pair that `check_pair` refuses, a
    model that is not prepared, `keep_best` without validation, and a loss that is not finite.
    """
    if keep_best and validation is None:
        raise ValueError("keep_best chooses by the validation accuracy: give a validation pair")
    encoded, labels = check_pair(model, *train)
    held_out = None if validation is None else check_pair(model, *validation)
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    start, history = time.perf_counter(), History()
    steps = total_steps(len(encoded), settings)
    run = TrainingRun(model, settings, device, steps, make_optimizer or adamw, forward)
    bar = tqdm(total=steps, desc="steps", disable=not settings.progress, leave=False)
    for epoch in range(settings.epochs):
        history.losses += run.epoch(encoded, labels, (settings.seed, epoch), bar)
        check_losses(history.losses)
        bar.set_postfix(loss=f"{history.losses[-1]:.3f}")
        if held_out:
            history.accuracies.append(accuracy(model, *held_out, device, settings, forward))
            bar.set_postfix(loss=f"{history.losses[-1]:.3f}", accuracy=f"{history.accuracies[-1]:.1%}")
            if keep_best and history.best_epoch() == epoch:
                best = {parameter: parameter.detach().clone() for parameter in run.trained}
    bar.close()
    if keep_best:
        for parameter, value in best.items():
            parameter.data.copy_(value)
    history.seconds = time.perf_counter() - start
    return history


def check_losses(losses):
    """Raise ValueError, naming the step, unless all `losses` are finite."""
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {step} is {loss}: lower the learning rate or alpha")


def check_messages(model, encoded):
    """Raise ValueError unless there are messages, each an array (T,) of ids in `model`'s vocabulary."""
    if len(encoded) == 0:
        raise ValueError("there are no messages: encode some first")
    size = next(part.num_embeddings for part in model.modules() if isinstance(part, torch.nn.Embedding))
    for number, ids in enumerate(map(np.asarray, encoded)):
        integers = ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu"
        if not integers or ids.min() < 0 or ids.max() >= size:
            raise ValueError(
                f"message {number} must be token ids, at least one, from 0 to {size - 1}: use encode_messages"
            )


def check_pair(model, encoded, labels):
    """Return the messages and their labels, (N,) int64 on the CPU; raise ValueError if they do not fit."""
    check_messages(model, encoded)
    labels = np.asarray(labels)
    if labels.shape != (len(encoded),):
        raise ValueError(f"{len(encoded)} messages and labels {labels.shape}: need one label for each")
    *_, head = (part for part in model.modules() if isinstance(part, torch.nn.Linear))
    classes = head.out_features
    if not np.isin(labels, range(classes)).all():
        raise ValueError(f"the labels must be integers from 0 to {classes - 1}, the model's classes")
    return encoded, torch.tensor(labels, dtype=torch.long)


def total_steps(messages, settings):
    """Return the number of optimizer steps of a training on so many messages."""
    batches = math.ceil(messages / settings.batch_size)
    return settings.epochs * math.ceil(batches / settings.gradient_accumulation_steps)


def adamw(model, learning_rate, *, total_steps, **options):
    """Return torch.optim.AdamW for what requires a gradient; `total_steps`, the training's, is not used."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, **options)


class TrainingRun:
    """The optimizer, schedule and scaler of one `fit`, and its passes over the data."""

    def __init__(self, model, settings, device, steps, make_optimizer=adamw, forward=last_token_logits):
        self.model, self.settings, self.device = model, settings, device
        stored, chosen = stored_precision(model), choose_precision(device, settings.precision)
        self.precision = chosen if stored == "float32" else stored
        self.forward = torch.compile(forward, dynamic=True) if settings.compile else forward
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if {parameter.dtype for parameter in self.trained} != {torch.float32}:
            raise ValueError(
                "what trains must be some parameters in float32: "
                "choose them with requires_grad, then call prepare(model, settings, device)"
            )
        self.optimizer = make_optimizer(
            model, settings.learning_rate, total_steps=steps, weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        fp16 = self.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=fp16)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: 1 - done / steps if settings.decay else 1.0
        )

    def epoch(self, encoded, labels, seed, bar=None):
        """Train once on every message, in an order that depends on `seed`; return each step's loss.

        `bar`, if given, is a tqdm that counts the steps.
        """
        self.model.train()
        settings, lengths = self.settings, [len(ids) for ids in encoded]
        batches = length_batches(lengths, settings.batch_size, seed, settings.bucket)
        size = settings.gradient_accumulation_steps
        groups = [batches[start : start + size] for start in range(0, len(batches), size)]
        losses = []
        for group in groups:
            losses.append(self.step(encoded, labels, group))
            if bar is not None:
                bar.update()
        return torch.stack(losses).tolist()  # one copy from the device per epoch: no step waits for it

    def step(self, encoded, labels, batches):
        """Take one optimizer step on the messages in `batches`, arrays (B,); return their mean loss ()."""
        count, total = sum(len(indices) for indices in batches), 0.0
        bound = tokens_at_once(self.settings, self.device, training=True)
        for batch in batches:
            for indices in split_batch(encoded, batch, bound):
                total = total + self.backward(*self.load(encoded, labels, indices), count)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        return total

    def load(self, encoded, labels, indices):
        """Return ids (B, T), lengths (B,) and labels (B,) of the chosen messages on the device."""
        return *pad_batch(encoded, indices, self.device), labels[indices].to(self.device)

    def backward(self, ids, lengths, targets, count):
        """Add the gradient of (summed loss) / `count`; return that part () of the step's mean loss.

        ids (B, T), lengths (B,) and targets (B,) are a part of the step's `count` messages.
        """
        with autocast(self.device, self.precision):
            logits = self.forward(self.model, ids, lengths, self.settings.gradient_checkpointing)
        loss = cross_entropy(logits.float(), targets, reduction="sum") / count
        self.scaler.scale(loss).backward()
        return loss.detach()


def accuracy(model, encoded, labels, device, settings=TrainingSettings(), forward=last_token_logits):
    """Return the fraction of correct predictions, 0 to 1, for encoded messages with labels (N,).

    `forward` is that of `fit`. Raises what `predict` raises, and ValueError for labels that do not fit
    messages or model.
    """
    encoded, labels = check_pair(model, encoded, labels)
    predictions = predict(model, encoded, device, settings, forward).argmax(dim=1)
    return (predictions == labels).float().mean().item()


def predict(model, encoded, device, settings=TrainingSettings(), forward=last_token_logits):
    """Return logits (N, classes), float32 on the CPU, at each message's last token, in the given order.

    `forward` is that of `fit`; without it `model` is chapter 4's.
    A model is evaluated in the precision in which its weights are stored: float32 unless it comes from
    `prepare` with another. Raises ValueError for messages that `check_messages` refuses, and for logits
    that are not finite.
    """
    check_messages(model, encoded)
    precision = stored_precision(model)
    order = np.argsort([-len(ids) for ids in encoded], kind="stable")  # the longest first
    size = settings.eval_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    bound = tokens_at_once(settings, device, training=False)
    parts = [part for batch in batches for part in split_batch(encoded, batch, bound)]
    was_training, results = model.training, []
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            for indices in parts:
                logits = forward(model, *pad_batch(encoded, indices, device))
                results.append(logits.float().cpu())
    finally:
        model.train(was_training)
    logits = torch.cat(results)[np.argsort(order)]
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite: the model's training has diverged, train it again")
    return logits
