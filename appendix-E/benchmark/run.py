"""Time the book's loop, this repository's fast path, and transformers + PEFT, side by side.

    python appendix-E/benchmark/run.py --json speed.json --plot speed.png   # a quarter of an hour, two cores
    python appendix-E/benchmark/run.py --quick --assets embedded            # three minutes, no downloads
    python appendix-E/benchmark/run.py --parts accuracy                     # five seeds of each, half an hour

Every contender runs in a process of its own; they take turns, round after round, and medians are reported.
The messages are those of --assets, the model has GPT-2 small's shape. A value with ~ is extrapolated: where
the book's loop would take too long, its time for n tokens is n times that of the token halfway. This flatters
it, since the cost of a token grows faster than the text's length.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import timeit
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path

try:
    from book_assets.command_line import add_assets_flag, command
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")
import numpy as np
import torch

from benchmark.accuracy import compare_accuracy
from benchmark.report import Measurement, compare_contenders, message_flops, plot, table
from benchmark.sides import CONFIG, TINY, serve, synchronise
from benchmark.weights import write_weights
from book_assets import choose_assets, get_tokenizer
from book_assets.files import check_outputs, replacing, write_whole
from fast_path.batches import length_batches
from fast_path.settings import PRECISIONS
from fast_path.training import choose_precision
from finetune_spam import describe_machine
from spam_classifier.classifier import encode_splits, load_splits

BATCH, PROMPT = 8, 4
DATA_NAMES = {"book": "SMS Spam Collection", "embedded": "embedded messages"}
MATRIX_WIDTH = {"cpu": 2048, "mps": 2048, "cuda": 8192}  # of the product that measures the machine's peak
PARTS = ("training", "generation", "memory", "loading", "accuracy")


class ContenderError(RuntimeError):
    """A contender's process failed or ended."""


class Contender:
    """A process that runs one contender; `do(method, …)` returns its (seconds, result)."""

    def __init__(self, name, device, config, width, threads=None):
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, theirs) = name, context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, name, device, config, width, threads), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    def do(self, method, *arguments):
        """Raises ContenderError if the method raises an error or the process ends."""
        try:
            self.connection.send((method, arguments))
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise ContenderError(f"{self.name} ended in {method}, perhaps for lack of memory") from None
        if isinstance(answer, Exception):
            raise ContenderError(f"{self.name} failed in {method}: {answer!r}") from answer
        return answer

    def seconds(self, method, *arguments):
        return self.do(method, *arguments)[0]

    def close(self):
        with suppress(OSError):  # the process may have ended
            self.connection.send(None)
        self.process.join()


def strata(items, count, key):
    """Return `count` of the items, those at the midpoints of equal quantile bins by `key`."""
    items = sorted(items, key=key)
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]


def count_tokens(messages):
    return sum(len(ids) for ids in messages)


def epoch_rate(name, train, batches, validation, step, evaluate):
    """Return the training examples per second of an epoch with the evaluations that belong to it.

    `train` and `validation` messages, `batches` steps of `step` seconds, `evaluate` seconds per message.
    """
    if name == "book":  # drops the last batch; losses of 5 + 5 batches every 50 steps, accuracies of 5 + 5
        batches = train // BATCH
        train = batches * BATCH
        validation = BATCH * (10 * batches / 50 + 10)
    return train / (batches * step + validation * evaluate)


def measure_machine(device, width):
    """Return the best matrix products (FLOP/s) and memory reading (bytes/s) of several tries.

    The matrices are (width, width). "flops" is in the precision that ours and transformers train in,
    "float32_flops" in the book's.
    """
    square, precision = torch.randn(width, width, device=device), choose_precision(device)
    low = square.to(PRECISIONS[precision])
    long, vector = torch.randn(65536, 1024, device=device), torch.randn(65536, device=device)

    def best(work):
        return min(timeit.repeat(lambda: (work(), synchronise(device)), number=1, repeat=6))

    float32 = best(lambda: square @ square)
    return {
        "float32_flops": 2 * width**3 / float32,
        "flops": 2 * width**3 / (float32 if precision == "float32" else best(lambda: low @ low)),
        "bytes_per_second": 4 * long.numel() / min(best(lambda: vector @ long), best(long.sum)),
    }


class Benchmark:
    """The messages and what was measured on them: measurements, percentages of a step, accuracies."""

    def __init__(self, args):
        self.args, self.config, self.rounds = args, TINY if args.tiny else CONFIG, 2 if args.quick else 5
        self.measurements, self.percentages, self.accuracies = [], {}, []
        self.data = DATA_NAMES[args.assets.data]
        self.encoded = encode_splits(load_splits(args.assets), get_tokenizer(), 256)  # gpt2-tiny's context
        self.train, self.validation = self.encoded["train"][0], self.encoded["validation"][0]
        self.lengths = [len(ids) for ids in self.train]
        batches = length_batches(self.lengths, BATCH, seed=123)
        self.batches = [[self.train[index] for index in indices] for indices in batches]
        self.names = [name for name in args.contenders if name != "hf" or has_hugging_face()]

    def add(self, what, values, unit, **needs):
        """Add a measurement for each contender in `values`, a dictionary of its values in all rounds."""
        self.measurements += [Measurement(what, name, list(v), unit, **needs) for name, v in values.items()]

    @contextmanager
    def started(self, method, *arguments, names=None):
        """Give the contenders by name, each in its process and after `method`; end them afterwards."""
        contenders = {
            name: Contender(name, self.args.device, self.config, max(self.lengths), self.args.threads)
            for name in names or self.names
        }
        try:
            for contender in contenders.values():
                contender.do(method, *arguments)
            yield contenders
        finally:
            for contender in contenders.values():
                contender.close()

    def training(self):
        """Measure training steps and evaluation; from both follows an epoch with its evaluations."""
        chosen = strata(self.batches, 3 if self.args.quick else 6, key=count_tokens)
        held_out = strata(self.validation, 16 if self.args.quick else 48, key=len)[::-1]  # the longest first
        names = [*self.names, *(["compiled"] if self.args.compile else [])]
        with self.started("start_training", names=names) as contenders:
            for name, contender in contenders.items():
                first = sum(contender.seconds("step", batch) for batch in (chosen[0], chosen[-1]))
                if name == "compiled":
                    self.add("warm-up of torch.compile", {name: [first]}, "s")
            steps, evaluations = self.time_training(contenders, chosen, held_out)
            if "ours" in contenders:
                self.percentages = contenders["ours"].do("profile", chosen)[1]
                self.percentages["of the step waiting for data"] = contenders["ours"].do("waiting", chosen)[1]
        self.add_training(steps, evaluations, chosen, held_out)

    def time_training(self, contenders, batches, messages):
        """Return two dictionaries by name: seconds of a step and of one evaluated message, in every round."""
        steps, evaluations = {name: [] for name in contenders}, {name: [] for name in contenders}
        for _ in range(self.rounds):
            for name, contender in contenders.items():
                alike = name == "book"  # padded, every batch takes it the same time
                some, texts = (batches[:1], messages[:BATCH]) if alike else (batches, messages)
                steps[name].append(statistics.mean([contender.seconds("step", batch) for batch in some]))
                evaluations[name].append(contender.seconds("evaluate", texts) / len(texts))
        return steps, evaluations

    def add_training(self, steps, evaluations, batches, messages):
        """Add the measurements of `time_training`, with the operations that they need."""
        flops = partial(message_flops, self.config)
        sizes = len(self.train), len(self.batches), len(self.validation)
        rates = {
            name: [epoch_rate(name, *sizes, *pair) for pair in zip(steps[name], evaluations[name])]
            for name in steps
        }
        epoch = (2 * flops(self.train) + flops(self.validation)) / len(self.train)
        step = 2 * statistics.mean(map(flops, batches))
        inverse = {name: [1 / seconds for seconds in values] for name, values in evaluations.items()}
        self.add("training step", steps, "s", flops=step)
        self.add("training, whole epoch", rates, "examples/s", flops=epoch)
        self.add("evaluation", inverse, "examples/s", flops=flops(messages) / len(messages))

    def generation(self):
        """Measure tokens per second, greedy, from prompts of 4 tokens."""
        with self.started("start_generating") as contenders:
            for contender in contenders.values():  # warm-up
                contender.do("generate", 1, PROMPT, 2)
            pairs = product((1, BATCH), (20, 200, 800))
            for batch, count in ((1, 20), (1, 200), (BATCH, 20)) if self.args.quick else pairs:
                self.add_generation(contenders, batch, count)

    def add_generation(self, contenders, batch, count):
        """Measure `batch` texts of `count` new tokens each."""
        rates = {name: [] for name in contenders}
        extrapolated = {"book"} if count > 20 else set()
        for _ in range(1 if self.args.quick else 2):
            for name, contender in contenders.items():
                if name in extrapolated:
                    seconds = count * contender.seconds("generate", batch, PROMPT + count // 2, 1)
                else:
                    seconds = contender.seconds("generate", batch, PROMPT, count)
                rates[name].append(batch * count / seconds)
        for name, values in rates.items():
            self.add(f"generation, {count} tokens, batch {batch}", {name: values}, "tokens/s",
                     tokens=batch, extrapolated=name in extrapolated)

    def memory(self):
        """Measure the peak of a step on the batch with the most tokens, each contender in a new process."""
        largest = max(self.batches, key=count_tokens)
        for name in self.names:
            with self.started("start_training", names=[name]) as contenders:
                if peak := contenders[name].do("memory", largest)[1]:
                    self.add("peak memory of a step", {name: [peak / 2**20]}, "MiB")

    def loading(self):
        """Measure the seconds from the weights' safetensors file, in the system's cache, to a first token."""
        with tempfile.TemporaryDirectory() as folder:
            size = write_weights(Path(folder), self.config)
            with self.started("load", folder) as contenders:  # the first load, which imports, is not counted
                times = {name: [] for name in contenders}
                for _ in range(self.rounds):
                    for name, contender in contenders.items():
                        times[name].append(contender.seconds("load", folder))
        self.add("loading the weights, to a token", times, "s", bytes=size)

    def accuracy(self):
        """Compare the test accuracies of the printed loop and of ours on gpt2-tiny, seed by seed."""
        self.accuracies = compare_accuracy(
            self.encoded, torch.device(self.args.device), self.args.seeds, 1 if self.args.quick else 5,
            report=partial(print, file=sys.stderr, flush=True),
        )

    def padding(self):
        """Return the fraction of padding in the grouped batches: transformers computes it, we do not."""
        tokens = sum(len(batch) * max(map(len, batch)) for batch in self.batches)
        return 1 - sum(self.lengths) / tokens


def has_hugging_face():
    return all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


def read_options(argv=None):
    """Return the options; raise ValueError for those that cannot be met or would do nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    contenders = ("book", "ours", "hf")
    parser.add_argument("--quick", action="store_true", help="about three minutes, fewer rounds and lengths")
    parser.add_argument("--json", metavar="FILE", help="write all measurements")
    parser.add_argument("--plot", metavar="FILE", help="write a figure of the speed-ups")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    add_assets_flag(parser)  # of the choice only the data are used
    parser.add_argument("--threads", type=int, help="torch's threads in every process")
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=contenders)
    parser.add_argument("--compile", action="store_true", help="also time our step under torch.compile")
    parser.add_argument("--parts", nargs="+", default=PARTS[:-1], choices=PARTS,
                        help="what to measure; accuracy takes half an hour and runs only if named")
    parser.add_argument("--seeds", type=int, nargs="+", help="of --parts accuracy (default: 1 2 3 4 5)")
    parser.add_argument("--tiny", action="store_true", help="a toy model: tries the script, measures nothing")
    args = parser.parse_args(argv)
    args.assets = args.assets or choose_assets("book")
    check_device(args.device)
    check_options(args)
    args.seeds = args.seeds or [1, 2, 3, 4, 5]
    return args


def check_device(device):
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises where there is no such device
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def check_options(args):
    """Raise ValueError for options that contradict each other or would do nothing."""
    timed = {*args.parts} - {"accuracy"}
    pairs = {"book"} < {*args.contenders}
    problems = {
        "--threads must be at least 1": args.threads is not None and args.threads < 1,
        "--parts and --contenders: name each once": any(
            len({*names}) < len(names) for names in (args.parts, args.contenders)
        ),
        "--seeds are those of --parts accuracy: name this part too": args.seeds
        and "accuracy" not in args.parts,
        "--seeds must be from 0, each of them once": args.seeds and (
            min(args.seeds) < 0 or len({*args.seeds}) < len(args.seeds)
        ),
        "--compile is about our training step: it needs --parts training and --contenders ours": args.compile
        and not ("training" in args.parts and "ours" in args.contenders),
        "--tiny is about the timed parts: name one besides accuracy": args.tiny and not timed,
        "--plot compares times with the book's: it needs a timed part, book and another contender": args.plot
        and not (timed and pairs),
        "--contenders hf needs transformers and peft: pip install transformers peft": timed
        and [*args.contenders] == ["hf"] and not has_hugging_face(),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(problem)


def run_benchmark(args):
    """Measure the parts that `args` name and return everything as one dictionary, ready for JSON."""
    began, device = time.perf_counter(), torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = measure_machine(device, 256 if args.tiny else MATRIX_WIDTH[device.type])
    benchmark = Benchmark(args)
    for part in args.parts:
        print(f"{time.perf_counter() - began:.0f} s: {part}", file=sys.stderr, flush=True)
        try:
            getattr(benchmark, part)()
        except (ContenderError, ValueError) as error:  # what has been measured is kept
            print(f"{part} was given up: {error}", file=sys.stderr)
    return {
        "machine": machine | describe_machine(device),
        "messages": {"data": benchmark.data, "count": len(benchmark.train), "padding": benchmark.padding(),
                     "mean_tokens": float(np.mean(benchmark.lengths)), "longest": max(benchmark.lengths)},
        "precision": choose_precision(device), "quick": args.quick, "tiny": args.tiny,
        "rows": compare_contenders(benchmark.measurements, machine, benchmark.config),
        "percentages": benchmark.percentages, "accuracies": benchmark.accuracies,
        "seconds": time.perf_counter() - began,
    }


@command
def main(argv=None):
    """Run the command, see --help: write the numbers, then print the table, then draw the figure."""
    args = read_options(argv)
    check_outputs(*filter(None, (args.json, args.plot)))
    report = run_benchmark(args)
    if not report["rows"] and not report["accuracies"]:
        raise ValueError("nothing could be measured: see the lines above")
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(table(report))
    if args.plot:
        with replacing(args.plot) as partial:
            plot(report["rows"], partial, Path(args.plot).suffix[1:] or "png")


if __name__ == "__main__":
    main()
