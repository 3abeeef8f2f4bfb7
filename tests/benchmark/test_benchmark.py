"""The benchmark's arithmetic, its table and its contenders. No time is asserted."""

import numpy as np
import pandas as pd
import pytest
import torch

import ch06
from benchmark import run as benchmark_run
from benchmark.accuracy import compare_accuracy, padded_loaders
from benchmark.report import (
    Measurement,
    accuracy_lines,
    compare_contenders,
    message_flops,
    plot,
    table,
    token_seconds,
)
from benchmark.run import BATCH, Benchmark, Contender, ContenderError, epoch_rate, main, read_options, strata
from benchmark.sides import CONTENDERS, RANK, TINY, Book, Fast
from benchmark.weights import write_weights
from gpt_download import load_gpt2
from spam_classifier.classifier import PRINTED, encode_splits

CPU = torch.device("cpu")
MACHINE = {"float32_flops": 1e9, "flops": 2e9, "bytes_per_second": 4e9}
SMALL = {**TINY, "vocab_size": 300, "context_length": 64}


def report(*measurements, **changes):
    machine = {**MACHINE, "processor": "cpu", "device": "cpu", "threads": 2, "torch": "2"}
    messages = {"count": 10, "data": "some", "mean_tokens": 30, "longest": 120, "padding": 0.1}
    return {"machine": machine, "messages": messages, "precision": "float32", "seconds": 60.0,
            "percentages": {}, "accuracies": [],
            "rows": compare_contenders(measurements, MACHINE, TINY), **changes}


def test_the_roofline_counts_the_last_block_once_per_message():
    config = {"emb_dim": 10, "n_layers": 2}
    one_token = message_flops(config, [[1]])
    assert one_token == 2 * 2 * 1200  # every block whole: the token is the last one too
    assert message_flops(config, [[1] * 3]) == 2 * 1200 * 3 + 2 * (3 * 200 + 1000)


def test_a_token_costs_reading_the_weights_or_the_products():
    config = {"emb_dim": 10, "n_layers": 2, "vocab_size": 60}
    weights = 2 * 1200 + 600
    assert token_seconds(config, MACHINE, 1) == pytest.approx(2 * weights / 1e9)
    slow_memory = {**MACHINE, "bytes_per_second": 1e9}
    assert token_seconds(config, slow_memory, 1) == pytest.approx(4 * weights / 1e9)
    assert token_seconds(config, slow_memory, 8) == pytest.approx(16 * weights / 1e9)
    generated = Measurement("generation", "ours", [1.0], "tokens/s", tokens=8)
    assert generated.roofline(slow_memory, config) == pytest.approx(2 * weights / 1e9)


def test_ratios_are_above_one_for_the_better_contender():
    rows = compare_contenders([
        Measurement("training", "book", [1.0, 2.0, 30.0], "examples/s", flops=1e8),
        Measurement("training", "ours", [8.0], "examples/s", flops=1e8),
        Measurement("memory", "book", [400.0], "MiB"),
        Measurement("memory", "ours", [100.0], "MiB"),
    ], MACHINE, TINY)
    assert [row["value"] for row in rows] == [2.0, 8.0, 400.0, 100.0]
    assert [row.get("times_book") for row in rows] == [None, 4.0, None, 4.0]
    assert [row.get("roofline_fraction") for row in rows] == [0.2, 0.4, None, None]
    assert [row.get("times_book_at_roofline") for row in rows] == [None, 10.0, None, None]


@pytest.mark.parametrize("need, seconds", [({"flops": 1e9}, 0.5), ({"bytes": 8e9}, 2.0)])
def test_seconds_are_compared_with_the_rooflines_seconds(need, seconds):
    step = Measurement("a step", "ours", [4.0], "s", **need)
    assert step.roofline(MACHINE, TINY) == seconds
    assert step.roofline_fraction(MACHINE, TINY) == seconds / 4.0


def test_means_and_spreads_are_over_seeds_and_the_difference_is_paired():
    runs = [{"seed": seed, "book": book, "ours": book + 0.02, "book_seconds": 60.0, "ours_seconds": 6.0}
            for seed, book in ((1, 0.90), (2, 0.94))]
    text = "\n".join(accuracy_lines(runs))
    assert "| 2 | 94.00 % | 96.00 % | 2.00 | 60 | 6 |" in text
    assert "| mean | 92.00 % | 94.00 % | 2.00 | 60 | 6 |" in text
    assert "| standard deviation | 2.83 % | 2.83 % | 0.00 | 0 | 0 |" in text
    assert accuracy_lines([]) == []


@pytest.fixture
def few_messages():
    rows = [(n % 2, f"{('see you', 'win a prize now')[n % 2]} {n} {'really ' * (n % 5)}") for n in range(40)]
    part = pd.DataFrame(rows, columns=["Label", "Text"])
    return {"train": part[:24], "validation": part[24:32], "test": part[32:]}


def test_the_printed_loop_gets_the_batches_of_the_printed_dataset(few_messages, tokenizer, tmp_path):
    encoded = encode_splits(few_messages, tokenizer, 256)
    few_messages["train"].to_csv(tmp_path / "train.csv", index=None)
    dataset = ch06.SpamDataset(tmp_path / "train.csv", tokenizer)
    torch.manual_seed(5)
    printed = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True)
    ours = padded_loaders(encoded, PRINTED.with_training(seed=5).training)["train"]
    torch.manual_seed(6)
    expected = list(printed)
    torch.manual_seed(6)
    for batch, (ids, labels) in zip(ours, expected, strict=True):
        assert torch.equal(batch[0], ids) and torch.equal(batch[1], labels)


def test_both_ways_are_trained_with_every_seed(few_messages, tokenizer):
    encoded, lines = encode_splits(few_messages, tokenizer, 256), []
    runs = compare_accuracy(encoded, CPU, seeds=(1, 2), epochs=1, report=lines.append)
    assert [run["seed"] for run in runs] == [1, 2] and len(lines) == 2
    for run in runs:
        assert 0 <= run["book"] <= 1 and 0 <= run["ours"] <= 1
        assert run["book_seconds"] > 0 and run["ours_seconds"] > 0


def test_the_table_marks_extrapolations_and_a_missing_contender():
    text = table(report(Measurement("generation", "book", [2.0], "examples/s", extrapolated=True)))
    assert "~2 examples/s" in text and "pip install transformers peft" in text


def test_the_plot_is_written(tmp_path):
    rows = report(*(Measurement("training", name, [2.0], "examples/s") for name in ("book", "ours")))["rows"]
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    plot(rows[:1], tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()  # no ratio, no figure


def test_an_epoch_contains_its_evaluations():
    sizes = {"train": 80, "batches": 10, "validation": 20}
    assert epoch_rate("ours", **sizes, step=1.0, evaluate=0.5) == 80 / (10 * 1.0 + 20 * 0.5)
    assert epoch_rate("book", **sizes, step=1.0, evaluate=0.5) == 80 / (10 * 1.0 + 8 * 12 * 0.5)


def test_the_printed_epoch_drops_the_last_batch():
    printed = epoch_rate("book", train=87, batches=11, validation=20, step=1.0, evaluate=0.5)
    assert printed == epoch_rate("book", train=80, batches=10, validation=20, step=1.0, evaluate=0.5)


def test_strata_are_spread_evenly():
    assert strata(range(100), 4, key=int) == [12, 37, 62, 87]


def test_random_weights_are_a_readable_gpt2(tmp_path):
    size = write_weights(tmp_path, SMALL)
    settings, params = load_gpt2(tmp_path, "safetensors")
    assert settings["n_embd"] == 32 and len(params["blocks"]) == 2
    assert params["wte"].shape == (300, 32)
    assert 0 <= (tmp_path / "model.safetensors").stat().st_size - size < 10_000


def some_messages():
    return [np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)]


def test_book_and_ours_train_the_same_number_of_parameters():
    counts = []
    for kind in (Book, Fast):
        contender = kind(CPU, SMALL, width=20)
        contender.start_training()
        assert np.isfinite(contender.step(some_messages()))
        counts.append(sum(p.numel() for p in contender.model.parameters() if p.requires_grad))
    assert counts[0] == counts[1] == RANK * (2 * (4 * 64 + 2 * 160) + 34)


def test_the_profile_divides_the_whole_step():
    contender = Fast(CPU, SMALL, width=20)
    contender.start_training()
    percentages = contender.profile([some_messages()])
    assert sum(percentages.values()) == pytest.approx(100) and min(percentages.values()) > 0
    assert 0 < contender.waiting([some_messages()]) < 100
    text = table(report(percentages=percentages))
    assert "Our training step's time:" in text and "% attention" in text


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "compiled"])
def test_every_contender_trains_evaluates_generates_and_loads(name, tmp_path):
    contender = CONTENDERS[name](CPU, SMALL, width=20)
    contender.start_training()
    assert contender.step(some_messages()) > 0 and contender.evaluate(some_messages()) is not None
    assert contender.memory(some_messages()) is None or contender.memory(some_messages()) > 10**7
    contender.start_generating()
    contender.generate(2, 4, 3)
    write_weights(tmp_path, SMALL)
    contender.load(tmp_path)


def test_the_messages_are_split_as_printed(book_data, monkeypatch):
    path = book_data / "sms_spam_collection" / "SMSSpamCollection"
    monkeypatch.setattr(ch06, "load_messages", lambda choice: ch06.read_messages(path))
    benchmark = Benchmark(read_options(["--assets", "book"]))
    assert [len(benchmark.encoded[name][0]) for name in ch06.SPLITS] == [1045, 149, 300]
    assert max(benchmark.lengths) == 120 and sum(map(len, benchmark.batches)) == 1045
    assert max(map(len, benchmark.batches)) == BATCH and 0 < benchmark.padding() < 0.3
    assert benchmark.data == "SMS Spam Collection"


def test_a_contender_answers_reports_errors_and_is_named_when_it_ends():
    contender = Contender("ours", "cpu", SMALL, width=20)
    contender.do("start_training")
    seconds, loss = contender.do("step", some_messages())
    assert seconds > 0 and np.isfinite(loss)
    with pytest.raises(ContenderError, match="ours failed in generate: TypeError"):
        contender.do("generate")
    contender.process.kill()
    with pytest.raises(ContenderError, match="ours ended in step, perhaps for lack of memory"):
        contender.do("step", some_messages())
    contender.close()
    assert not contender.process.is_alive()


@pytest.mark.parametrize("arguments, message", [
    (["--device", "abacus"], "--device abacus"),
    (["--threads", "0"], "--threads must be at least 1"),
    (["--json", "."], "cannot be written"),
    (["--seeds", "1"], "--seeds are those of --parts accuracy"),
    (["--compile", "--parts", "memory"], "--compile is about our training step"),
    (["--assets", "library"], "'library' is not a choice of assets"),
    (["--contenders", "nobody"], "invalid choice: 'nobody'"),
])
def test_arguments_are_checked_before_anything_is_measured(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_run, "run_benchmark", lambda args: pytest.fail("it measures"))
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert message in f"{end.value}{capsys.readouterr().err}"
