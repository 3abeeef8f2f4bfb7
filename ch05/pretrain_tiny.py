"""Pretrain `gpt2-tiny`, the small GPT-2 that this repository ships, on a folder of plain text.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \\
        python ch05/pretrain_tiny.py --corpus FOLDER --work-dir build/gpt2-tiny --steps 4000

FOLDER contains *.txt or *.txt.gz files whose documents are separated by a line `<|endoftext|>`.
The two variables keep glibc from returning large buffers to the kernel after every step.
A run that was stopped resumes from its last checkpoint when the same command is given again.
"""

import argparse
import gzip
import json
import math
import random
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

try:
    from book_assets.command_line import command
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from book_assets import get_tokenizer
from book_assets.files import append_line, check_outputs, replacing, write_whole
from book_assets.table import EMBEDDED_MODEL
from ch04 import GPTModel, pick_device, use_fused_attention
from ch05 import check_divergence
from gpt_checkpoint import write_checkpoint
from gpt_download import CONFIG_NAMES, SAFETENSORS_FILE

TINY_CONFIG = {
    "vocab_size": 50257,
    "context_length": 256,
    "emb_dim": 192,
    "n_heads": 6,
    "n_layers": 6,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
END_OF_TEXT_ID = 50256


@dataclass
class Schedule:
    """Learning rate: linear warm-up, constant peak, linear decay at the end."""

    steps: int
    peak: float = 2e-3
    warmup: int = 150  # steps
    decay: float = 0.25  # fraction of the steps
    floor: float = 0.05  # of the peak

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps train nothing: take 1 or more")

    def rate(self, step):
        """Return the learning rate of `step`, counted from 0."""
        left = (self.steps - step) / (self.decay * self.steps)  # 1 or more before the decay begins
        return self.peak * min((step + 1) / self.warmup, max(self.floor, min(1.0, left)))


def read_documents(folder):
    """Return the documents of more than 200 characters in all *.txt and *.txt.gz files, in file-name order.

    Raises FileNotFoundError if there are none, ValueError for a file that is damaged or not UTF-8.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.name.endswith((".txt", ".txt.gz")))
    documents = []
    for path in files:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                text = file.read()
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be read ({error}): give UTF-8 text or leave it out") from error
        documents += [document.strip() for document in text.split("\n<|endoftext|>\n")]
    documents = [text for text in documents if len(text) > 200]
    if not documents:
        raise FileNotFoundError(f"no *.txt or *.txt.gz with documents in {folder}: name another --corpus")
    return documents


def split_and_encode(documents, tokenizer, held_out=0.01, seed=123):
    """Return the training and the held-out tokens, two uint16 arrays.

    Long documents are first cut into pieces of 20,000 characters, so that both parts have some of every book.
    """
    pieces = [text[i : i + 20_000] for text in documents for i in range(0, len(text), 20_000)]
    random.Random(seed).shuffle(pieces)
    ids = tokenizer.encode_ordinary_batch(pieces)
    count = max(1, round(held_out * len(ids)))
    return tuple(
        np.array([token for piece in part for token in (*piece, END_OF_TEXT_ID)], dtype=np.uint16)
        for part in (ids[count:], ids[:count])
    )


class SampledSoftmax:
    """Cross-entropy over part of the vocabulary, with an unbiased estimate of the softmax's denominator.

    Σⱼ exp(lⱼ) ≈ Σ frequent + Σ this batch's rare targets + Σ sampled rare ones / (k · q), where the k
    sampled tokens are drawn with probability q, proportional to their frequency. With 50,257
    outputs on a body of width 192 the full softmax is four fifths of all arithmetic.
    Source: Jean et al., "On Using Very Large Target Vocabulary" (2015).
    """

    def __init__(self, counts, frequent=3072, sampled=1024):
        order = torch.argsort(counts, descending=True)
        self.frequent = order[:frequent]
        self.rare = order[frequent:]
        self.sampled = sampled
        self.weights = counts[self.rare].double() + 0.5
        self.log_q = torch.zeros(len(counts))
        self.log_q[self.rare] = (self.weights / self.weights.sum()).log().float()
        self.is_rare = torch.zeros(len(counts), dtype=torch.bool)
        self.is_rare[self.rare] = True
        self.column = torch.empty(len(counts), dtype=torch.long)

    def candidates(self, targets):
        """Return token ids (C,), their log-weights (C,), and how many at the start are not sampled."""
        wanted = targets[self.is_rare[targets]].unique()
        drawn = self.rare[torch.multinomial(self.weights, self.sampled, replacement=True)]
        drawn = drawn[~torch.isin(drawn, wanted)]
        exact = torch.cat((self.frequent, wanted))
        log_weight = -self.log_q[drawn] - math.log(self.sampled)
        return torch.cat((exact, drawn)), torch.cat((torch.zeros(len(exact)), log_weight)), len(exact)

    def loss(self, features, targets, embedding):
        """Return the mean loss in nats for features (N, D), targets (N,) and embedding (V, D)."""
        tokens, log_weight, exact = self.candidates(targets.cpu())
        self.column[tokens[:exact]] = torch.arange(exact)
        device = features.device
        logits = features @ F.embedding(tokens.to(device), embedding).T + log_weight.to(device)  # (N, C)
        return F.cross_entropy(logits, self.column[targets.cpu()].to(device))


def initialise(model):
    """Initialise as GPT-2: normal(0, 0.02), residual projections divided by √(2 · layers), tied head."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            residual = name.endswith(("out_proj.weight", "layers.2.weight"))
            scale = (2 * len(model.trf_blocks)) ** -0.5 if residual else 1.0
            torch.nn.init.normal_(parameter, std=0.02 * scale)
    model.out_head.weight = model.tok_emb.weight  # tied, as in GPT-2


def windows(tokens, starts, length):
    """Return inputs and targets, int64 (B, length) each, that begin at `starts`."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def held_out_loss(model, tokens, device, length, batches=8, rows=8):
    """Return the mean full-softmax loss in nats per token over evenly spaced windows of held-out text."""
    starts = np.linspace(0, len(tokens) - length - 1, batches * rows).astype(int)
    losses = []
    for part in np.split(starts, batches):
        inputs, targets = (each.to(device) for each in windows(tokens, part, length))
        for features, row in zip(model.features(inputs), targets, strict=True):  # row by row: 256 × 50,257
            losses.append(F.cross_entropy(model.out_head(features), row).item())
    return sum(losses) / len(losses)


def make_optimizer(model):
    """Return AdamW with weight decay 0.1 on matrices and none on vectors; `train_step` sets its rate."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def resume(path, model, optimizer):
    """Load the checkpoint `path`, if it exists, into both; return (steps done, seconds so far).

    Raises ValueError if it is damaged or another program's.
    """
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, map_location=model.tok_emb.weight.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch raises many kinds here
        raise ValueError(f"{path} is no checkpoint of such a run: take another --work-dir") from error
    print(f"resuming from step {state['step']} of {path}")
    return state["step"], state["seconds"]


def train_step(model, optimizer, softmax, inputs, targets, rate):
    """Make one optimizer step on inputs and targets (B, T) at learning rate `rate`; return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    features = model.features(inputs).flatten(0, 1)  # (B · T, D)
    loss = softmax.loss(features, targets.flatten(), model.tok_emb.weight)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def log_row(path, row):
    """Append a row of the log to the file `path`, one JSON object per line, and print it."""
    line = json.dumps(row, allow_nan=False)
    append_line(path, line)
    print(line, flush=True)


def pretrain(train, held_out, work_dir, schedule, batch_size=12, seed=123, every=250):
    """Train from scratch or from `work_dir`'s checkpoint, append to log.jsonl, and return the model.

    Raises ValueError for texts shorter than a window, and if the training diverges.
    """
    device = pick_device()
    length = TINY_CONFIG["context_length"]
    if min(len(train), len(held_out)) < length + 2:
        raise ValueError(
            f"{len(train)} training and {len(held_out)} held-out tokens: both must be more than "
            f"{length + 1}: take a larger corpus"
        )
    path = work_dir / "checkpoint.pt"
    torch.manual_seed(seed)
    model = GPTModel(TINY_CONFIG)
    initialise(model)
    model.to(device)
    use_fused_attention(model)
    optimizer = make_optimizer(model)
    softmax = SampledSoftmax(torch.from_numpy(np.bincount(train, minlength=TINY_CONFIG["vocab_size"])))
    first, seconds = resume(path, model, optimizer)
    began = time.perf_counter() - seconds
    losses = []
    for step in range(first, schedule.steps):
        rng = np.random.default_rng((seed, step))  # the same batches after a resume
        torch.manual_seed(seed * 1_000_003 + step)
        starts = rng.integers(0, len(train) - length - 1, batch_size)
        batch = (each.to(device) for each in windows(train, starts, length))
        losses.append(train_step(model, optimizer, softmax, *batch, schedule.rate(step)))
        done = step + 1
        if done % every == 0 or done == schedule.steps:
            row = {
                "step": done, "tokens": done * batch_size * length,
                "train_loss": round(sum(losses) / len(losses), 4),
                "held_out_loss": round(held_out_loss(model, held_out, device, length), 4),
                "learning_rate": schedule.rate(step), "seconds": round(time.perf_counter() - began, 1),
            }
            losses = []
            check_divergence(model.parameters(), done)  # before it replaces a good checkpoint
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write_checkpoint(path, state | {"step": done, "seconds": row["seconds"]})
            log_row(work_dir / "log.jsonl", row)
    return model


def export(model, folder, config=None, dtype=torch.float16):
    """Write the weights under GPT-2's names, with hparams.json, to `folder` (`config` None: TINY_CONFIG)."""
    config = config or TINY_CONFIG
    tensors = {"wte.weight": model.tok_emb.weight, "wpe.weight": model.pos_emb.weight}
    norms = {"ln_f": model.final_norm}
    for number, block in enumerate(model.trf_blocks):
        att, prefix = block.att, f"h.{number}"
        norms |= {f"{prefix}.ln_1": block.norm1, f"{prefix}.ln_2": block.norm2}
        query_key_value = (att.W_query, att.W_key, att.W_value)
        for name, layers in (
            ("attn.c_attn", query_key_value), ("attn.c_proj", (att.out_proj,)),
            ("mlp.c_fc", block.ff.layers[:1]), ("mlp.c_proj", block.ff.layers[2:]),
        ):  # Conv1D's orientation: (in, out)
            tensors[f"{prefix}.{name}.weight"] = torch.cat([layer.weight for layer in layers]).T
            tensors[f"{prefix}.{name}.bias"] = torch.cat([layer.bias for layer in layers])
    for name, norm in norms.items():
        tensors |= {f"{name}.weight": norm.scale, f"{name}.bias": norm.shift}
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(folder / SAFETENSORS_FILE) as partial:
        save_file(stored, partial, metadata={"format": "pt"})
    hparams = {name: config[ours] for name, ours in CONFIG_NAMES.items()}
    write_whole(folder / "hparams.json", json.dumps(hparams) + "\n")


def load_tokens(cache, corpus):
    """Return training and held-out tokens from the file `cache`, or of the folder `corpus`, then cached.

    Raises ValueError if the file is damaged, and what `read_documents` raises.
    """
    if not cache.exists():
        train, held_out = split_and_encode(read_documents(corpus), get_tokenizer())
        with replacing(cache) as partial, open(partial, "wb") as file:
            np.savez(file, train=train, held_out=held_out)
    try:
        with np.load(cache) as tokens:
            return tokens["train"], tokens["held_out"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{cache} is damaged: delete it, so that the corpus is read again") from error


@command
def main(arguments=None):
    """Run the command, see --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="folder of *.txt or *.txt.gz")
    parser.add_argument("--work-dir", type=Path, default=Path("build/gpt2-tiny"))
    parser.add_argument("--steps", type=int, default=4000, help="of 12 × 256 tokens each")
    parser.add_argument("--export", type=Path, default=EMBEDDED_MODEL, help="folder for the finished model")
    args = parser.parse_args(arguments)
    schedule = Schedule(args.steps)
    work_files = [args.work_dir / name for name in ("tokens.npz", "checkpoint.pt", "log.jsonl")]
    check_outputs(*work_files, args.export / SAFETENSORS_FILE, args.export / "hparams.json")
    train, held_out = load_tokens(work_files[0], args.corpus)
    print(f"{len(train):,} training tokens, {len(held_out):,} held out", flush=True)
    model = pretrain(train, held_out, args.work_dir, schedule)
    export(model, args.export)
    print(f"wrote {args.export / SAFETENSORS_FILE}")


if __name__ == "__main__":
    main()
