"""The contenders that `run.py` times, each with the same methods on the same messages.

(a) `Book`: chapters 4 to 6 and appendix E as printed. (b) `Fast`: `fast_path` and the key-value cache.
(c) `HuggingFace`: transformers and PEFT in their fastest configuration: batches grouped and padded as
little as possible, fused attention, autocast, fused optimizer, and glibc told to keep freed memory, as
for (b). PEFT gives the joint query, key and value layer one A, ours has three, so it trains a little less.
The model has GPT-2 small's shape and random weights, which take the same time as trained ones.

`messages` are lists of int32 arrays (T,) of token ids; every second one counts as spam.
"""

import time
import warnings

import numpy as np
import torch
from torch import nn
from torch.profiler import profile

from appendix_e import freeze, replace_linear_with_lora
from ch04 import GPT_CONFIG_124M, GPTModel
from ch05 import generate, load_weights_into_gpt
from ch06 import add_classification_head, calc_accuracy_loader, calc_loss_batch, cut_or_pad
from fast_path.batches import pad_batch
from fast_path.memory import keep_freed_memory, peak_memory, quiet_stderr
from fast_path.settings import TrainingSettings
from fast_path.training import TrainingRun, autocast, choose_precision, predict, prepare
from gpt_download import load_gpt2

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
        self.padding_id = config["vocab_size"] - 1

    def build_classifier(self):
        """Put a GPT-2 with a head of two classes and LoRA in every linear layer on the device."""
        torch.manual_seed(123)
        self.model = add_classification_head(GPTModel(self.config))
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
        """Return ids (B, width) and labels (B,) as `SpamDataset` and a DataLoader give them."""
        rows = [cut_or_pad(ids.tolist(), self.width, self.padding_id) for ids in messages]
        return torch.tensor(rows), torch.arange(len(rows)) % 2

    def step(self, messages):
        """Take a training step, the body of `train_classifier_simple`'s inner loop; return the loss."""
        inputs, targets = self.batch(messages)
        self.optimizer.zero_grad()
        loss = calc_loss_batch(inputs, targets, self.model, self.device)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate(self, messages):
        """Classify the messages in batches of 8; return the accuracy, 0 to 1."""
        batches = [messages[start : start + 8] for start in range(0, len(messages), 8)]
        accuracy = calc_accuracy_loader([self.batch(batch) for batch in batches], self.model, self.device)
        self.model.train()
        return accuracy

    def start_generating(self):
        torch.manual_seed(123)
        self.model = GPTModel(self.config).to(self.device).eval()

    def prompt(self, batch, length):
        """Return random ids (batch, length)."""
        return torch.randint(self.config["vocab_size"], (batch, length), device=self.device)

    def generate(self, batch, length, new_tokens, **cache):
        """Continue `batch` prompts of `length` tokens greedily by `new_tokens`."""
        generate(self.model, self.prompt(batch, length), new_tokens, self.config["context_length"], **cache)

    def load(self, folder):
        """Read the weights and generate a token: before that, the file may only be mapped into memory."""
        model = GPTModel(self.config).eval()
        load_weights_into_gpt(model, load_gpt2(folder, "safetensors")[1])
        self.model = model.to(self.device)
        self.generate(1, 1, 1)

    def memory(self, messages):
        """Return the peak bytes of a step on `messages`, after a first step that allocates the optimizer."""
        self.step(messages[:1])
        return peak_memory(lambda: self.step(messages), self.device)


class TimedRun(TrainingRun):
    """A training run that adds up the seconds of padding messages and moving them to the device."""

    data_seconds = 0.0

    def load(self, *arguments):
        began = time.perf_counter()
        batch = super().load(*arguments)
        self.data_seconds += time.perf_counter() - began
        return batch


class Fast(Book):
    """The fast path of this repository."""

    compile = False

    def start_training(self):
        self.build_classifier()
        settings = TrainingSettings(
            learning_rate=LEARNING_RATE, decay=False, weight_decay=WEIGHT_DECAY, compile=self.compile
        )
        prepare(self.model, settings, self.device).train()
        keep_freed_memory()
        self.run = TimedRun(self.model, settings, self.device, steps=1)

    def step(self, messages):
        return self.run.step(messages, torch.arange(len(messages)) % 2, [np.arange(len(messages))]).item()

    def waiting(self, batches):
        """Return the percentage of the time of a step on each of `batches` that is spent waiting for data."""
        began, before = time.perf_counter(), self.run.data_seconds
        for messages in batches:
            self.step(messages)
        return 100 * (self.run.data_seconds - before) / (time.perf_counter() - began)

    def profile(self, batches):
        """Return by kind the percentage of the operations' time in a step on each of `batches`."""
        seconds = dict.fromkeys((*OPERATIONS, "everything else"), 0.0)
        with quiet_stderr(), profile() as profiler:
            for messages in batches:
                self.step(messages)
        for event in profiler.key_averages():
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # a kernel: its time is also that of the operation that started it
            kinds = (kind for kind, names in OPERATIONS.items() if event.key.startswith(names))
            own = event.self_cpu_time_total if self.device.type != "cuda" else event.self_device_time_total
            seconds[next(kinds, "everything else")] += own
        return {kind: 100 * own / sum(seconds.values()) for kind, own in seconds.items()}

    def evaluate(self, messages):
        """Return logits (N, 2)."""
        return predict(self.model, messages, self.device, self.run.settings)

    def start_generating(self):
        super().start_generating()
        prepare(self.model.requires_grad_(False), TrainingSettings(precision="float32"), self.device)

    def generate(self, batch, length, new_tokens):
        super().generate(batch, length, new_tokens, use_cache=True)


class Compiled(Fast):
    """The fast path's training step under torch.compile."""

    compile = True


class HuggingFace(Book):
    """transformers and PEFT: SDPA, dynamic padding, the precision that the hardware computes fastest."""

    def hf_config(self, **more):
        from transformers import GPT2Config, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")  # PEFT's, about the one Linear among Conv1D layers
        c = self.config
        return GPT2Config(
            vocab_size=c["vocab_size"], n_positions=c["context_length"], n_embd=c["emb_dim"],
            n_layer=c["n_layers"], n_head=c["n_heads"], embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
            attn_implementation="sdpa", pad_token_id=self.padding_id, **more,
        )

    def start_training(self):
        from peft import LoraConfig, get_peft_model
        from transformers import GPT2ForSequenceClassification

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
        """Return logits (B, 2), float32, at the last token before the padding."""
        ids, lengths = pad_batch(messages, np.arange(len(messages)), self.device)
        columns = torch.arange(ids.shape[1], device=self.device)
        ids = ids.masked_fill(columns >= lengths[:, None], self.padding_id)
        with autocast(self.device, self.precision):
            return self.model(input_ids=ids).logits.float()

    def step(self, messages):
        self.optimizer.zero_grad()
        targets = torch.arange(len(messages), device=self.device) % 2
        loss = nn.functional.cross_entropy(self.logits(messages), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def evaluate(self, messages):
        """Return a list of logits (B, 2), one for each batch."""
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


CONTENDERS = {"book": Book, "ours": Fast, "hf": HuggingFace, "compiled": Compiled}


def synchronise(device):
    """Wait until `device` has finished all work submitted to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def serve(connection, name, device, config, width, threads):
    """Run a contender's process: receive (method, arguments), send (seconds, result) or the error.

    Of results only numbers and dictionaries are sent. None instead of a job ends the process.
    """
    if threads:
        torch.set_num_threads(threads)
    contender = CONTENDERS[name](torch.device(device), config, width)
    while (job := connection.recv()) is not None:
        method, args = job
        began = time.perf_counter()
        try:
            result = getattr(contender, method)(*args)
            synchronise(contender.device)
            numbers = result if isinstance(result, (int, float, dict)) else None
            connection.send((time.perf_counter() - began, numbers))
        except Exception as error:
            connection.send(error)
