"""The comparison: what each method trains, resuming."""

import json
import multiprocessing
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from appendix_e import count_parameters
from book_assets import Choice
from spam_classifier import experiments
from spam_classifier.classifier import build_classifier
from spam_classifier.experiments import (
    METHODS,
    choose_parameters,
    compare,
    read_runs,
    summary,
)

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")


@pytest.mark.usefixtures("stand_ins")
def test_each_method_trains_what_it_says():
    counts = {}
    for method in METHODS:
        model, _ = build_classifier("tiny")
        choose_parameters(model, method)
        counts[method.title] = count_parameters(model)[0]
    head, model = 16 * 2 + 2, build_classifier("tiny")[0]
    total = count_parameters(model)[1]
    ranks = [counts[f"LoRA, all layers, rank {rank}"] - head for rank in (1, 2, 4, 8, 16, 32)]
    assert ranks == [ranks[0] * rank for rank in (1, 2, 4, 8, 16, 32)]
    assert ranks[0] == 2 * (4 * (16 + 16) + 2 * (16 + 64))
    assert counts["last layer"] == head and counts["all weights"] == total
    assert head < counts["last block"] < total
    assert counts["LoRA, query and value, rank 16"] == 2 * 2 * 16 * 32 + head


@pytest.mark.usefixtures("stand_ins")
def test_a_comparison_is_resumed_not_repeated(tmp_path, bf16_processor):
    file, lines = tmp_path / "results" / "runs.jsonl", []
    methods = METHODS[1:3]
    first = compare(EMBEDDED, file, methods[:1], (1,), epochs=1, device=CPU, report=lines.append)
    both = compare(EMBEDDED, file, methods, (1, 2), epochs=1, device=CPU, report=lines.append)
    again = compare(EMBEDDED, file, methods, (1, 2), epochs=1, device=CPU, report=lines.append)
    assert len(first) == 1 and len(both) == len(lines) == len(read_runs(file)) == 4
    pd.testing.assert_frame_equal(both, again)
    assert first["test"][0] == both["test"][0]
    table = summary(both)
    assert table.index.tolist() == [method.title for method in methods]
    embedding_bytes = (2 if bf16_processor else 4) * 50257 * 16
    assert "±" in table["test (%)"].iloc[0] and (both["step_memory_bytes"] > embedding_bytes).all()


def test_the_summary_is_in_percent_with_the_standard_deviation_of_the_seeds():
    run = {
        "title": "one", "trained_parameters": 1000, "checkpoint_bytes": 4e6, "seconds_per_step": 0.1,
        "step_memory_bytes": None, "train": 1.0, "validation": 0.9, "test": 0.95,
    }
    alone = summary(pd.DataFrame([run]))
    assert alone.loc["one", "test (%)"] == "95.0" and alone.loc["one", "step memory (MB)"] == ""
    both = summary(pd.DataFrame([run, {**run, "test": 0.97}]))
    assert both.loc["one", "test (%)"].replace("\xa0", " ") == "96.0 ± 1.4"  # n - 1 in the denominator


# The file of runs

RUN = {
    "model": "tiny", "data": "book", "title": "one", "kind": "lora", "settings": {}, "pretrained": True,
    "trained_parameters": 1, "total_parameters": 2, "checkpoint_bytes": 3, "seconds_per_step": 0.1,
    "step_memory_bytes": None, "final_loss": 0.5, "train": 1.0, "validation": 0.9, "test": 0.95,
}


@pytest.mark.parametrize("line, problem", [
    ("not json", "Expecting value"), ("", "Expecting value"), (json.dumps(RUN)[:50], ""), ("[]", "it lacks"),
    ("7", ""), ("null", ""), ('"text"', "it lacks"), ("{}", "it lacks checkpoint_bytes, data, final_loss"),
    (json.dumps(RUN | {"test": float("nan")}), "test is nan"), (json.dumps(RUN | {"test": None}), ""),
    (json.dumps(RUN | {"final_loss": "low"}), ""), ("\0\0\0", ""), (b"\xff\xfe", ""),
])
def test_a_damaged_line_is_named_with_what_to_do(tmp_path, line, problem):
    file, line = tmp_path / "runs.jsonl", line if isinstance(line, bytes) else line.encode()
    good = json.dumps(RUN).encode()
    file.write_bytes(b"\n".join([good, line, good, b""]))
    with pytest.raises(ValueError, match=rf"runs.jsonl, line 2, is not .*{problem}.*: delete this line"):
        read_runs(file)
    file.write_bytes(b"\r\n".join([good, good]))
    assert read_runs(file) == [RUN, RUN]


@pytest.mark.parametrize("methods, seeds, problem", [
    ([], (1,), "methods"), (METHODS[:1], (), "seeds"), (METHODS[:1], (1, 1), "seeds"),
    (METHODS[:1] * 2, (1,), "methods"), (METHODS[:1], (1, -1), "seed must be"), (METHODS[:1], (0.5,), "seed"),
])
def test_what_cannot_be_compared_is_refused_before_any_training(tmp_path, methods, seeds, problem):
    file = tmp_path / "runs.jsonl"
    with pytest.raises(ValueError, match=problem):
        compare(EMBEDDED, file, methods, seeds, device=CPU, report=None)
    assert not file.exists()


@pytest.mark.usefixtures("stand_ins")
def test_a_file_that_cannot_be_written_is_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "run_method", None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    for output in (tmp_path, tmp_path / "file" / "runs.jsonl"):
        with pytest.raises(ValueError, match="cannot be written"):
            compare(EMBEDDED, output, METHODS[:1], (1,), device=CPU)


@pytest.mark.usefixtures("stand_ins")
def test_a_diverged_run_is_named_and_not_written(tmp_path, monkeypatch):
    bad = replace(METHODS[9], settings=METHODS[9].settings.with_training(learning_rate=1.0))
    monkeypatch.setattr(experiments, "finetune", diverge)
    with pytest.raises(ValueError, match="last block, seed 3: the loss of step 7 is nan"):
        compare(EMBEDDED, tmp_path / "runs.jsonl", [bad], (3,), epochs=1, device=CPU)
    assert read_runs(tmp_path / "runs.jsonl") == []


def diverge(*_):
    raise ValueError("the loss of step 7 is nan: lower the learning rate")


def compare_slowly(file, seeds, barrier):
    """In a process of its own: compare with a training that takes 0.05 s and no model."""
    experiments.load_encoded = lambda *_: {"train": ()}
    experiments.run_method = lambda method, *_: time.sleep(0.05) or {
        name: RUN[name] for name in (*experiments.MEASURED, "step_memory_bytes")
    }
    barrier.wait(60)
    compare(EMBEDDED, file, METHODS[1:7], seeds, epochs=1, device=CPU, report=lambda line: None)


def test_two_processes_share_one_file(tmp_path):
    file, context = tmp_path / "runs.jsonl", multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=compare_slowly, args=(file, seeds, barrier)) for seeds in ((1, 2), (2, 1))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    runs = [(run["title"], run["settings"]["training"]["seed"]) for run in read_runs(file)]
    assert len(set(runs)) == 12 and len(runs) <= 14  # at the meeting point a run may be made twice
