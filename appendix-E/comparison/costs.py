"""What a training step costs, in seconds and memory, at the shapes of gpt2-tiny, GPT-2 small and medium.

Run it with nothing else running. Memory is counted tensor by tensor, so it is the same on every CPU.
"""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from appendix_e import count_parameters
from book_assets.files import append_line, check_outputs
from ch04 import GPT_CONFIG_124M, GPTModel
from ch06 import add_classification_head
from comparison.grid import read_rows
from fast_path.packed_model import last_token_logits
from fast_path.settings import TrainingSettings
from fast_path.training import autocast, fit, prepare
from lora.adapters import save_adapter
from lora.files import WEIGHTS_FILE
from lora.optimizer import lora_adamw
from pretrain_tiny import TINY_CONFIG
from spam_classifier.experiments import step_memory
from spam_classifier.memory_check import CPU

GPT2_SMALL = {**GPT_CONFIG_124M, "drop_rate": 0.0, "qkv_bias": True}
GPT2_MEDIUM = {**GPT2_SMALL, "emb_dim": 1024, "n_layers": 24, "n_heads": 16}
SHAPES = {"tiny": TINY_CONFIG, "GPT-2 small": GPT2_SMALL, "GPT-2 medium": GPT2_MEDIUM}
MESSAGES, TOKENS = 8, 128
SETTINGS = TrainingSettings(
    epochs=1, batch_size=MESSAGES, precision="float32", progress=False, max_tokens=MESSAGES * TOKENS, seed=1
)


def settings_for(contender):
    """Return SETTINGS with the contender's own `precision`, if it has one."""
    return replace(SETTINGS, precision=getattr(contender, "precision", SETTINGS.precision))


def build_adapted(contender, config):
    """Return chapter 4's model of the shape `config`, random, with two classes and the contender in it."""
    torch.manual_seed(1)
    model = add_classification_head(GPTModel(config))
    return prepare(contender.adapt(model, "all", "head"), settings_for(contender), CPU)


def draw_messages(config, steps):
    """Return ([token ids (TOKENS,)], labels) for so many `steps`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config["vocab_size"], (steps * MESSAGES, TOKENS), generator=generator)
    return [*ids.numpy()], torch.arange(steps * MESSAGES) % 2


def time_step(contender, config, steps):
    """Return the mean seconds of `steps` training steps of MESSAGES × TOKENS tokens."""
    model = build_adapted(contender, config)
    messages, settings = draw_messages(config, steps), settings_for(contender)
    history = fit(model, messages, settings, CPU, make_optimizer=lora_adamw)
    return history.seconds / steps


def kept_for_backward(contender, config):
    """Return the bytes that autograd keeps between forward and backward, the parameters not counted."""
    model, kept = build_adapted(contender, config), {}
    lora_adamw(model, SETTINGS.learning_rate, total_steps=1)  # without one, some relatives refuse to train
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        place = tensor.untyped_storage()
        if place.data_ptr() not in parameters:
            kept[place.data_ptr()] = place.nbytes(), tensor  # held, so that no place is used twice
        return tensor

    messages, _ = draw_messages(config, 1)
    ids, lengths = torch.stack([*map(torch.from_numpy, messages)]), torch.full((MESSAGES,), TOKENS)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(CPU, settings_for(contender).precision):
        logits = last_token_logits(model.train(), ids, lengths)
    logits.sum().backward()
    return sum(size for size, _ in kept.values())


def adapter_bytes(contender, config):
    """Return the size of the contender's saved adapter, the head included."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(build_adapted(contender, config), folder)
        return Path(folder, WEIGHTS_FILE).stat().st_size


def run_costs(contenders, output, model="tiny", rounds=3, steps=4, report=print):
    """Measure every contender at the shape `model`, a key of SHAPES; add the rows to the file `output`.

    Seconds are the median of `rounds`, in each of which all contenders take their turn. Returns the rows; a
    contender whose row the file contains is not measured again.
    """
    check_outputs(output)
    config, rows = SHAPES[model], [row for row in read_rows(output) if row["task"] == "costs"]
    done = {row["title"]: row for row in rows if row["model"] == model}
    missing = [each for each in contenders if each.title not in done]
    times = {each.title: [] for each in missing}
    for _ in range(rounds):
        for each in missing:
            times[each.title].append(time_step(each, config, steps))
    for each in missing:
        row = {
            "task": "costs", "model": model, "tokens": MESSAGES * TOKENS, "threads": torch.get_num_threads(),
            **asdict(each), "seconds_per_step": median(times[each.title]), **measure_memory(each, config),
        }
        append_line(output, json.dumps(row))
        report(f"{model}, {each.title}: {row['seconds_per_step']:.3f} s per step")
        done[each.title] = row
    return [done[each.title] for each in contenders]


def measure_memory(contender, config):
    """Return trained parameters, and bytes: model, kept for backward, peak of a step, saved adapter."""
    model, messages = build_adapted(contender, config), {"train": draw_messages(config, 1)}
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "trained": count_parameters(model)[0],
        "model_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "kept_bytes": kept_for_backward(contender, config),
        "step_memory_bytes": step_memory(model, messages, settings_for(contender), CPU),
        "checkpoint_bytes": adapter_bytes(contender, config),
    }
