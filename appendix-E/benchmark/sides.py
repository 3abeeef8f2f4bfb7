"""The sides that `benchmark.py` times, each with the same methods on the same messages.

(a) `Book`: chapters 4 to 6 and appendix E as printed. (b) `Fast`: `fast_training` and the key-value
cache. (c) `HuggingFace`: transformers and PEFT at their best: batches grouped and padded as little as
possible, fused attention, autocast, fused optimizer, and glibc told to keep freed memory, as for (b).
PEFT gives the joint query, key and value layer one A, ours has three, so it trains a little less. The
model has GPT-2 small's shape and random weights, which cost the same time as trained ones.
"""

import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ch04 import GPT_CONFIG_124M, GPTModel

CONFIG = {**GPT_CONFIG_124M, "drop_rate": 0.0, "qkv_bias": True}
TINY = {**CONFIG, "emb_dim": 32, "n_layers": 2, "n_heads": 4}  # to try the script itself
OPERATIONS = {  # for the profile: how torch's names of each kind begin
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "GELU": ("aten::gelu",),
}
RANK, LEARNING_RATE, WEIGHT_DECAY = 16, 5e-5, 0.1


class Book:
    """The printed listings: padded to `width`, the longest training message; float32, no cache."""

    def __init__(self, device, config, width):
        self.device, self.config, self.width = device, config, width

    def build_classifier(self):
        from appendix_e import freeze, replace_linear_with_lora

        torch.manual_seed(123)
        self.model = GPTModel(self.config)
        self.model.out_head = nn.Linear(self.config["emb_dim"], 2)
        freeze(self.model)
        replace_linear_with_lora(self.model, rank=RANK, alpha=RANK)
        self.model.to(self.device)

    def start_training(self):
        self.build_classifier()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        self.model.train()

    def batch(self, messages):
        """Ids (B, width) and labels (B,) as `SpamDataset` and a DataLoader give them."""
        from ch06 import cut_or_pad

        rows = [cut_or_pad(ids.tolist(), self.width, self.config["vocab_size"] - 1) for ids in messages]
        return torch.tensor(rows), torch.arange(len(rows)) % 2

    def step(self, messages):
        """The body of `train_classifier_simple`'s inner loop."""
        from ch06 import calc_loss_batch

        inputs, targets = self.batch(messages)
        self.optimizer.zero_grad()
        loss = calc_loss_batch(inputs, targets, self.model, self.device)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate(self, messages):
        from ch06 import calc_accuracy_loader

        batches = [messages[start : start + 8] for start in range(0, len(messages), 8)]
        accuracy = calc_accuracy_loader([self.batch(batch) for batch in batches], self.model, self.device)
        self.model.train()
        return accuracy

    def start_generating(self):
        torch.manual_seed(123)
        self.model = GPTModel(self.config).to(self.device).eval()

    def prompt(self, batch, length):
        return torch.randint(self.config["vocab_size"], (batch, length), device=self.device)

    def generate(self, batch, length, new_tokens):
        """Continue `batch` prompts of `length` tokens greedily by `new_tokens`."""
        from ch05 import generate

        generate(self.model, self.prompt(batch, length), new_tokens, self.config["context_length"])

    def load(self, folder):
        """Read the weights and compute a token with them: until then a side may only have mapped the file."""
        from ch05 import load_weights_into_gpt
        from gpt_download import load_gpt2

        model = GPTModel(self.config).eval()
        load_weights_into_gpt(model, load_gpt2(folder, "safetensors")[1])
        self.model = model.to(self.device)
        self.generate(1, 1, 1)

    def memory(self, messages):
        """Peak bytes of a step on `messages`: on a GPU what torch allocated, else the process."""
        self.step(messages[:1])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(messages)
            return torch.cuda.max_memory_allocated(self.device)
        forget_peak()
        self.step(messages)
        return peak_memory()


class Fast(Book):
    """The fast path of this repository."""

    compile = False

    def start_training(self):
        from fast_path.training import FastSettings, History, TrainingRun, keep_freed_memory, prepare

        self.build_classifier()
        settings = FastSettings(
            learning_rate=LEARNING_RATE, decay=False, weight_decay=WEIGHT_DECAY, compile=self.compile
        )
        prepare(self.model, settings, self.device).train()
        keep_freed_memory()
        self.run = TrainingRun(self.model, settings, self.device, History())

    def step(self, messages):
        return self.run.step(messages, torch.arange(len(messages)) % 2, [np.arange(len(messages))]).item()

    def data_seconds(self):
        """Seconds that all steps so far have spent on padding messages and moving them to the device."""
        return self.run.data_seconds

    def profile(self, batches):
        """Percent of the operations' time in a step on each of `batches`, by kind."""
        from torch.profiler import profile

        from spam_classifier.experiments import quiet_stderr

        on_gpu, shares = self.device.type == "cuda", dict.fromkeys((*OPERATIONS, "everything else"), 0.0)
        with quiet_stderr(), profile() as profiler:
            for messages in batches:
                self.step(messages)
        for event in profiler.key_averages():
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # a kernel: its time stands with the operation that called it
            kinds = (kind for kind, names in OPERATIONS.items() if event.key.startswith(names))
            seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            shares[next(kinds, "everything else")] += seconds
        return {kind: 100 * seconds / sum(shares.values()) for kind, seconds in shares.items()}

    def evaluate(self, messages):
        from fast_path.training import predict

        return predict(self.model, messages, self.device, self.run.settings)

    def start_generating(self):
        from fast_path.training import FastSettings, prepare

        super().start_generating()
        prepare(self.model.requires_grad_(False), FastSettings(precision="float32"), self.device)

    def generate(self, batch, length, new_tokens):
        from ch05 import generate

        prompt, context = self.prompt(batch, length), self.config["context_length"]
        generate(self.model, prompt, new_tokens, context, use_cache=True)


class Compiled(Fast):
    """The fast path's training step under torch.compile."""

    compile = True


class HuggingFace(Book):
    """transformers and PEFT: SDPA, dynamic padding, the precision that the hardware computes fastest."""

    def hf_config(self, **more):
        from transformers import GPT2Config, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")  # peft's, about the one Linear among Conv1D layers
        c = self.config
        return GPT2Config(
            vocab_size=c["vocab_size"], n_positions=c["context_length"], n_embd=c["emb_dim"],
            n_layer=c["n_layers"], n_head=c["n_heads"], embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
            attn_implementation="sdpa", pad_token_id=c["vocab_size"] - 1, **more,
        )

    def start_training(self):
        from peft import LoraConfig, get_peft_model
        from transformers import GPT2ForSequenceClassification

        from fast_path.training import choose_precision, keep_freed_memory

        torch.manual_seed(123)
        model = GPT2ForSequenceClassification(self.hf_config(num_labels=2, use_cache=False))
        adapter = LoraConfig(
            r=RANK, lora_alpha=RANK * RANK, target_modules=["c_attn", "c_proj", "c_fc", "score"],
            fan_in_fan_out=True,
        )
        self.model = get_peft_model(model, adapter).to(self.device).train()
        keep_freed_memory()
        self.precision = choose_precision(self.device)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=self.device.type in ("cpu", "cuda")
        )

    def logits(self, messages):
        from fast_path.training import autocast, padded

        ids, lengths = padded(messages, np.arange(len(messages)), self.device)
        columns = torch.arange(ids.shape[1], device=self.device)
        ids = ids.masked_fill(columns >= lengths[:, None], self.config["vocab_size"] - 1)
        with autocast(self.device, self.precision):
            return self.model(input_ids=ids).logits.float()  # read at the last token before the padding

    def step(self, messages):
        self.optimizer.zero_grad()
        targets = torch.arange(len(messages), device=self.device) % 2
        loss = nn.functional.cross_entropy(self.logits(messages), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate(self, messages):
        size = 8 if self.device.type == "cpu" else 64  # a CPU gains nothing from more, and pads more
        self.model.eval()
        with torch.inference_mode():
            logits = [self.logits(messages[i : i + size]).cpu() for i in range(0, len(messages), size)]
        self.model.train()
        return logits

    def start_generating(self):
        from transformers import GPT2LMHeadModel

        torch.manual_seed(123)
        config = self.hf_config(tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
        self.model = GPT2LMHeadModel(config).to(self.device).eval()

    def generate(self, batch, length, new_tokens):
        prompt = self.prompt(batch, length)
        with torch.inference_mode():
            self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            )

    def load(self, folder):
        from transformers import GPT2LMHeadModel, logging

        logging.disable_progress_bar()
        self.model = GPT2LMHeadModel.from_pretrained(folder).to(self.device).eval()
        self.generate(1, 1, 1)


def peak_memory():
    """Peak resident memory of this process in bytes (since `forget_peak` on Linux), None if unknown."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def forget_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:  # not Linux, or not allowed: the peak then includes building the model
        pass


def synchronise(device):
    """Wait until `device` has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def serve(connection, name, device, config, width, threads):
    """A side's own process: receive (method, arguments), send (seconds, numbers) or the error."""
    if threads:
        torch.set_num_threads(threads)
    side = SIDES[name](torch.device(device), config, width)
    while (job := connection.recv()) is not None:
        method, args = job
        began = time.perf_counter()
        try:
            result = getattr(side, method)(*args)
            synchronise(side.device)
            numbers = result if isinstance(result, (int, float, dict)) else None
            connection.send((time.perf_counter() - began, numbers))
        except Exception as error:
            connection.send(error)


SIDES = {"book": Book, "ours": Fast, "hf": HuggingFace, "compiled": Compiled}
