"""Fine-tune chapter 4's model on next tokens, with or without LoRA, and measure its loss on other texts.

The logits are the large part: 50,257 for each token. They are computed, and their gradient taken, for a few
hundred tokens at a time, which changes neither the loss nor the gradient.
Shapes in comments: B windows, T tokens in each, D embedding width, N windows in all.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ch04 import use_fused_attention
from ch05 import check_divergence, load_gpt2_model
from fast_path.memory import keep_freed_memory
from fast_path.settings import PRECISIONS, OptimizerSettings, setting
from fast_path.training import adamw, autocast, check_losses, choose_precision

ROWS = 256  # tokens whose logits are computed at once


@dataclass(frozen=True)
class TextSettings(OptimizerSettings):
    """How `fit_text` trains. Raises ValueError for a value out of its range."""

    COUNTS = ("steps", "batch_size", "eval_every")

    steps: int = setting(200, "optimizer steps")
    batch_size: int = setting(4, "windows per step")
    learning_rate: float = setting(1e-3, "AdamW's learning rate")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    seed: int = setting(123, "random seed of dropout and of the order of windows")
    precision: str = setting("float32", "of products", choices=("auto", *PRECISIONS))
    warmup: int = setting(0, "steps in which the learning rate rises linearly from zero")
    clip_norm: float = setting(1.0, "largest norm of the gradient; a longer one is scaled down to it")
    eval_every: int = setting(50, "steps between two measurements of the validation loss")

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.warmup, int) or not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be an integer from 0 to steps ({self.steps}), not {self.warmup}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, not {self.clip_norm}: use inf not to clip")

    def rate(self, done):
        """Return the fraction of the learning rate, 0 to 1, that applies after `done` steps."""
        rise = min(1.0, (done + 1) / (self.warmup + 1))
        return rise * (1 - done / self.steps if self.decay else 1.0)


@dataclass
class TextHistory:
    """Mean loss per step and, if there were validation windows, {steps done: loss}, both in nats per token.

    `seconds` is the time of the steps alone.
    """

    losses: list = field(default_factory=list)
    validation: dict = field(default_factory=dict)
    seconds: float = 0.0


# Model and windows


def load_language_model(size):
    """Return (GPTModel with pretrained weights, its configuration), ready for `fit_text`.

    As `ch05.load_gpt2_model`, but the head has the token embedding's weight itself, not a copy, as in GPT-2:
    a full fine-tuning trains it once.
    """
    model, config = load_gpt2_model(size)
    model.out_head.weight = model.tok_emb.weight
    use_fused_attention(model)
    return model, config


def encode_windows(texts, tokenizer, length):
    """Return (windows, dropped): int32 ids (N, length + 1), and how many tokens at the end are left out.

    The texts are joined with <|endoftext|> between them and cut, without padding. A window's last token is
    also the next one's first, so that each token but the first is predicted once: inputs are
    windows[:, :-1], targets windows[:, 1:]. The name of a special token in a text is read as plain text.
    Raises ValueError for a single text instead of several, an empty one, a length below 1, and too few
    tokens for one window.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("give a list of texts, none of them empty")
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    ids = []
    for text in texts:
        ids += [*([tokenizer.eot_token] if ids else []), *tokenizer.encode_ordinary(text)]
    count = (len(ids) - 1) // length
    if count < 1:
        raise ValueError(
            f"{len(ids)} tokens make no window of {length + 1}: take more text or a smaller length"
        )
    windows = torch.tensor(ids, dtype=torch.int32).unfold(0, length + 1, length)
    return windows.contiguous(), len(ids) - 1 - count * length


def check_windows(model, windows):
    """Raise ValueError unless `windows` (N, T + 1) are ids in `model`'s vocabulary that fit its context."""
    vocabulary, context = model.tok_emb.num_embeddings, model.pos_emb.num_embeddings
    if windows.dim() != 2 or not len(windows) or not 2 <= windows.shape[1] <= context + 1:
        raise ValueError(
            f"windows {tuple(windows.shape)} must be (N, T + 1), T from 1 to {context}: use encode_windows"
        )
    if windows.is_floating_point() or windows.min() < 0 or windows.max() >= vocabulary:
        raise ValueError(f"windows must be token ids from 0 to {vocabulary - 1}: use encode_windows")


def draw_batches(count, settings):
    """Return the indices of each step's windows, (steps, B), of `count` windows.

    Every window is drawn once before any is drawn again, in an order that depends on the seed.
    """
    wanted = settings.steps * settings.batch_size
    epochs = [
        np.random.default_rng((settings.seed, epoch)).permutation(count)
        for epoch in range(math.ceil(wanted / count))
    ]
    return np.concatenate(epochs)[:wanted].reshape(settings.steps, settings.batch_size)


def take_windows(windows, indices, device):
    """Return inputs and targets, int64 (B, T) each on `device`, of the chosen windows."""
    chosen = windows[indices].to(device, torch.long)
    return chosen[:, :-1], chosen[:, 1:]


# Losses


def row_losses(model, features, targets, rows=ROWS):
    """Yield the summed loss () of `rows` tokens at a time, for features (B · T, D) and targets (B · T,)."""
    for some, wanted in zip(features.split(rows), targets.split(rows), strict=True):
        yield cross_entropy(model.out_head(some).float(), wanted, reduction="sum")


def choose_places(features, targets, places=None):
    """Return features (K, D) and targets (K,) at the `places` (K,) of a batch (B, T); all if that is None."""
    features, targets = features.flatten(0, 1), targets.flatten()
    return (features, targets) if places is None else (features[places], targets[places])


def summed_loss(model, inputs, targets, places=None):
    """Return the loss () of inputs and targets (B, T), summed over tokens; `places` as in `backward_mean`."""
    return sum(row_losses(model, *choose_places(model.features(inputs), targets, places)))


def backward_mean(model, inputs, targets, places=None, *, scale=lambda loss: loss, rows=ROWS):
    """Add the gradient of the mean loss of inputs and targets (B, T); return that loss (), in nats per token.

    - `places`: indices (K,) of the tokens that count, in the flattened batch; only their logits are computed
      (None: all)
    - `scale`: applied to each loss before its gradient is taken, see torch's GradScaler

    The loss's gradient with respect to the head's input is summed over groups of `rows` tokens, so that
    never more than one group's logits are in memory, and is then taken through the rest of the model at once.
    """
    features, targets = choose_places(model.features(inputs), targets, places)  # (K, D), (K,)
    cut = features.detach().requires_grad_(features.requires_grad)
    total = 0.0
    for loss in row_losses(model, cut, targets, rows):
        mean = loss / targets.numel()
        scale(mean).backward()
        total = total + mean.detach()
    if features.requires_grad:
        features.backward(cut.grad)
    return total


def mean_loss(model, windows, device, batch_size=8, precision="float32"):
    """Return the mean loss of `model` over all `windows` (N, T + 1), in nats per token.

    Measured without dropout; the model's mode is restored. Raises ValueError as `check_windows` does.
    """
    check_windows(model, windows)
    total = 0.0
    with restoring_mode(model), torch.inference_mode(), autocast(device, precision):
        model.eval()
        for indices in torch.arange(len(windows)).split(batch_size):
            total += summed_loss(model, *take_windows(windows, indices, device)).item()
    return total / (len(windows) * (windows.shape[1] - 1))


def perplexity(loss):
    """Return exp(loss): among how many equally likely tokens a loss in nats per token would be a guess."""
    return math.exp(loss)


@contextmanager
def restoring_mode(model):
    """Put `model` back afterwards, also after an error, into the mode (training or evaluation) it is in."""
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)


# Training


def fit_text(model, windows, settings, device, validation=None, make_optimizer=adamw):
    """Train what requires a gradient to predict the next tokens of `windows`, (N, T + 1).

    `make_optimizer`, called as `adamw` is, returns the optimizer; the learning rates of its groups follow
    `settings.rate`. The loss of `validation`, windows like the others, is measured before the first step,
    every `settings.eval_every` steps and at the end. `model` is on `device`; its mode is restored. Returns a
    `TextHistory`. Raises ValueError for windows that `check_windows` refuses, if nothing requires a gradient
    or it is not in float32, and if the training diverges.
    """
    for some in (windows, *([] if validation is None else [validation])):
        check_windows(model, some)
    run = TextRun(model, settings, device, make_optimizer)
    parts = np.split(draw_batches(len(windows), settings), stops(settings))

    def measure():
        return mean_loss(model, validation, device, precision=run.precision)

    return run.fit(
        parts, lambda indices: take_windows(windows, indices, device), None if validation is None else measure
    )


def adamw_on_matrices(model, learning_rate, *, total_steps, weight_decay, **options):
    """Return AdamW for what requires a gradient, as `adamw` does, with weight decay for matrices alone.

    Biases and the gains and shifts of normalisations, which have fewer than two dimensions, have none:
    pulling a gain to zero would switch its features off. LoRA's A and B are matrices.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=learning_rate, **options)


def stops(settings):
    """Return the numbers of steps, before the last one, after which the loss is measured."""
    return range(settings.eval_every, settings.steps, settings.eval_every)


class TextRun:
    """The optimizer, schedule and scaler of one training on next tokens, and its steps.

    Raises ValueError if nothing requires a gradient or it is not in float32.
    """

    def __init__(self, model, settings, device, make_optimizer):
        self.model, self.settings, self.device = model, settings, device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if {parameter.dtype for parameter in self.trained} != {torch.float32}:
            raise ValueError(
                "what trains must be some parameters in float32: choose them with requires_grad or apply_lora"
            )
        self.precision = choose_precision(device, settings.precision)
        self.optimizer = make_optimizer(
            model, settings.learning_rate, total_steps=settings.steps, weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.rate)
        fp16 = self.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=fp16)

    def fit(self, parts, load, measure=None):
        """Train on all batches, and return a `TextHistory`.

        - `parts`: lists of batches, arrays (B,) of indices; there are `settings.steps` batches in all
        - `load`: returns inputs and targets (B, T) of such a batch on the device, and the places that count
          if not all do, see `backward_mean`
        - `measure`: returns the validation loss; it is called before the first part and after each
        """
        keep_freed_memory()
        torch.manual_seed(self.settings.seed)
        history = TextHistory()
        total, hidden = self.settings.steps, not self.settings.progress
        bar = tqdm(total=total, desc="steps", disable=hidden, leave=False)
        with restoring_mode(self.model), bar:
            self.validate(history, measure)
            for batches in parts:
                self.train(history, load, batches)
                self.validate(history, measure)
                bar.update(len(batches))
                bar.set_postfix(loss=f"{history.losses[-1]:.3f}")
        check_divergence(self.trained, total)
        return history

    def train(self, history, load, batches):
        """Make one step for each of `batches`, arrays (B,); add the losses and the time to `history`."""
        self.model.train()
        start = time.perf_counter()
        losses = [self.step(*load(indices)) for indices in batches]
        history.losses += torch.stack(losses).tolist()  # one copy from the device: no step waits for it
        history.seconds += time.perf_counter() - start
        check_losses(history.losses)

    def step(self, inputs, targets, places=None):
        """Make one optimizer step on inputs and targets (B, T); return their mean loss ()."""
        with autocast(self.device, self.precision):
            loss = backward_mean(self.model, inputs, targets, places, scale=self.scaler.scale)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss

    def validate(self, history, measure):
        """Add what `measure` returns, unless it is None, to `history`."""
        if measure is not None:
            history.validation[len(history.losses)] = measure()
