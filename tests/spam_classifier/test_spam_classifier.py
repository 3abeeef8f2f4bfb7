import io
import json
import math
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ch05
import ch06
import lora_in_practice
from appendix_e import count_parameters
from book_assets import Choice
from lora.adapters import read_adapter
from lora.layers import adapted_layers
from lora_in_practice import main
from models import same_state, state
from spam_classifier import classifier
from spam_classifier.classifier import (
    LoRASettings,
    build_classifier,
    classify,
    encode_messages,
    load_classifier_adapter,
)
from spam_classifier.evaluation import (
    bootstrap,
    confusion_matrix,
    find_leaks,
    interval_table,
    normalise_text,
    scores,
    split_without_leaks,
    wrong_messages,
)
from spam_classifier.experiments import (
    METHODS,
    choose_parameters,
    compare,
    peak_of_allocations,
    read_runs,
    summary,
)
from topics.what_lora_buys import plot_confusion, plot_costs, plot_methods, plot_ranks

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")


def frame(*rows):
    return pd.DataFrame(rows, columns=["Label", "Text"])


# Leaks


def test_masking_forgets_case_numbers_and_blanks():
    assert normalise_text("Call 0800 12\tNOW ") == normalise_text("call 7 345  now") == "call 0 0 now"
    assert normalise_text("call now") != normalise_text("call later")


def test_exact_and_near_copies_are_told_apart():
    train = frame((1, "win 100 now"), (0, "see you"))
    test = frame((1, "win 100 now"), (1, "WIN 250 now"), (0, "see me"))
    leaks = find_leaks(test, train)
    assert leaks["exact"].tolist() == [True, False, False]
    assert leaks["near"].tolist() == [True, True, False]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=10, max_size=60), seed=st.integers(0, 99))
def test_a_split_without_leaks_keeps_every_message_and_no_copy_apart(sizes, seed):
    texts = [f"{chr(97 + g % 26)}{'x' * g} {copy}" for g, size in enumerate(sizes) for copy in range(size)]
    df = frame(*((i % 2, text) for i, text in enumerate(texts)))
    train, validation, test = split_without_leaks(df, 0.7, 0.1, seed)
    assert sorted(pd.concat([train, validation, test])["Text"]) == sorted(texts)
    assert not find_leaks(test, train, validation)["near"].any()
    assert not find_leaks(validation, train)["near"].any()
    assert abs(len(train) - 0.7 * len(df)) <= 4 and abs(len(train) + len(validation) - 0.8 * len(df)) <= 4


def test_the_books_split_leaks_spam_and_ours_does_not(book_data):
    df = ch06.create_balanced_dataset(
        ch06.read_messages(book_data / "sms_spam_collection" / "SMSSpamCollection"))
    df["Label"] = df["Label"].map(ch06.LABELS)
    train, validation, test = ch06.random_split(df, 0.7, 0.1)
    leaks = find_leaks(test, train)
    assert leaks.sum().to_dict() == {"exact": 37, "near": 46}
    assert test["Label"][leaks["near"]].sum() == 42
    assert find_leaks(test, train, validation).sum().to_dict() == {"exact": 41, "near": 50}
    parts = split_without_leaks(df, 0.7, 0.1)
    assert [len(part) for part in parts] == [1046, 150, 298]
    assert not find_leaks(parts[2], parts[0], parts[1])["near"].any()


# Scores


@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=50))
def test_scores_and_matrix_are_scikit_learns(pairs):
    from sklearn import metrics

    labels, guesses = np.array(pairs).T
    ours = scores(labels, guesses)
    assert ours["accuracy"] == pytest.approx(metrics.accuracy_score(labels, guesses))
    for name, function in (("precision", metrics.precision_score), ("recall", metrics.recall_score),
                           ("F1", metrics.f1_score)):
        assert ours[name] == pytest.approx(function(labels, guesses, zero_division=0)), name
    theirs = metrics.confusion_matrix(labels, guesses, labels=[0, 1])
    assert (confusion_matrix(labels, guesses) == theirs).all()


def test_bootstrap_intervals_are_seeded_hold_the_value_and_match_the_normal_one():
    labels = np.arange(300) % 2
    guesses = np.where(np.arange(300) % 10 == 0, 1 - labels, labels)  # 90% right
    table = bootstrap(labels, guesses)
    assert table.equals(bootstrap(labels, guesses))
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    half = 1.96 * math.sqrt(0.9 * 0.1 / 300)
    assert table.loc["accuracy", "low"] == pytest.approx(0.9 - half, abs=0.01)
    assert table.loc["accuracy", "high"] == pytest.approx(0.9 + half, abs=0.01)


def test_a_perfect_classifier_has_no_spread_and_no_wrong_messages():
    part = frame((0, "a"), (1, "b"), (1, "c"))
    labels = part["Label"].to_numpy()
    many, none = np.tile(labels, 20), labels[:0]
    assert len(interval_table({"all": (many, many), "none": (none, none)})) == 1
    assert interval_table({"all": (many, many)}).loc["all", "F1"] == "100.0 % (100.0 to 100.0)"
    assert wrong_messages(part, labels).empty
    wrong = wrong_messages(part, [0, 1, 0])
    assert wrong.to_dict("records") == [{"Label": 1, "Prediction": 0, "Text": "c"}]


def test_the_confusion_plot_shows_the_four_counts():
    figure = plot_confusion([0, 0, 1, 1, 1], [0, 1, 1, 1, 0])
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1", "1", "2"]


# The comparison and the command line, on a random model and made-up messages


@pytest.fixture(scope="module")
def params():
    rng, width = np.random.default_rng(0), 16

    def layer(d_in, d_out):
        weight = rng.normal(0, 0.1, (d_in, d_out)).astype(np.float32)
        return {"w": weight, "b": np.zeros(d_out, np.float32)}

    def norm():
        return {"g": np.ones(width, np.float32), "b": np.zeros(width, np.float32)}

    blocks = [{
        "attn": {"c_attn": layer(width, 3 * width), "c_proj": layer(width, width)},
        "mlp": {"c_fc": layer(width, 4 * width), "c_proj": layer(4 * width, width)},
        "ln_1": norm(), "ln_2": norm(),
    } for _ in range(2)]
    return {"wte": layer(50257, width)["w"], "wpe": layer(32, width)["w"], "blocks": blocks, **norm()}


@pytest.fixture(autouse=True)
def stand_ins(request, monkeypatch, tmp_path):
    if "params" not in request.fixturenames:
        return
    hparams = {"n_vocab": 50257, "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
    params = request.getfixturevalue("params")
    for module in (ch05, classifier):
        monkeypatch.setattr(module, "download_and_load_gpt2", lambda *_, **__: (hparams, params))
    rows = [("spam", f"win a prize now, number {n}") for n in range(20)]
    rows += [("ham", f"see you at home at {n}") for n in range(20)]
    monkeypatch.setattr(ch06, "load_messages", lambda choice: frame(*rows))
    monkeypatch.setattr(lora_in_practice, "pick_device", lambda: CPU)
    monkeypatch.setenv("LLM_ASSETS", "embedded")
    monkeypatch.chdir(tmp_path)


def test_each_method_trains_what_it_says(params):
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


def test_a_comparison_is_resumed_not_repeated(params, tmp_path, bf16_processor):
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
    assert plot_methods(both, 8).axes and plot_ranks(both, 8).axes and plot_costs(both).axes


def test_the_peak_counts_what_stands_at_once():
    def work():
        a = torch.ones(1000, 250)
        del a
        b, c = torch.ones(1000, 250), torch.ones(500, 250)
        return b.sum() + c.sum()

    assert 1.5e6 <= peak_of_allocations(work) < 1.6e6


def run_finetune(capsys, *options):
    main(["finetune", "--epochs", "2", "--learning-rate", "0.01", "--rank", "2", *options])
    return capsys.readouterr().out


@pytest.mark.usefixtures("bf16_processor")
def test_finetune_writes_an_adapter_that_every_command_reads(params, capsys, monkeypatch):
    out = run_finetune(capsys)
    assert "trainable:" in out and "epoch 2: validation accuracy" in out and "test" in out
    assert read_adapter("adapter").notes["settings"]["rank"] == 2
    main(["classify", "win a prize now"])
    assert capsys.readouterr().out.split()[-4:] == ["win", "a", "prize", "now"]
    monkeypatch.setattr("sys.stdin", io.StringIO("see you at home\n\nwin a prize\n"))
    main(["classify", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["see you at home", "win a prize"]
    assert all(a["label"] in ("spam", "not spam") and 0.5 <= a["probability"] <= 1 for a in answers)
    main(["evaluate"])
    out = capsys.readouterr().out
    assert "test messages" in out and "row true, column predicted" in out
    main(["export-peft"])
    main(["merge"])
    model, _, _ = load_classifier_adapter("adapter", CPU)
    merged, max_length = ch06.load_classifier("classifier.pth")
    ids = torch.arange(12)[None]
    assert not adapted_layers(merged) and max_length == 32
    torch.testing.assert_close(merged(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_the_fast_paths_options_reach_the_training(params, capsys, monkeypatch):
    seen, fit = [], classifier.fit
    monkeypatch.setattr(classifier, "fit", lambda *args: seen.append(args[2]) or fit(*args))
    out = run_finetune(capsys, "--precision", "bf16", "--gradient-accumulation-steps", "2", "--gradient-checkpointing")
    assert (seen[0].precision, seen[0].gradient_accumulation_steps, seen[0].gradient_checkpointing) == ("bf16", 2, True)
    assert "s of training" in out and not seen[0].compile
    with pytest.raises(SystemExit):
        run_finetune(capsys, "--precision", "int3")


def test_an_adapter_trained_on_either_processor_is_read_by_chapter_6(params, capsys, tokenizer, bf16_processor):
    run_finetune(capsys, "--precision", "auto")
    model, _, _ = load_classifier_adapter("adapter", CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    text = "win a prize now, number 3"
    answer = classify(model, [text], tokenizer, CPU)[0]
    assert ch06.classify_review(text, model, tokenizer, CPU) == answer["label"]


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(params, capsys):
    folders = []
    for number, seed in enumerate(("1", "1", "2")):
        folders.append(f"adapter{number}")
        run_finetune(capsys, "--seed", seed, "--output", folders[-1])
    a, b, c = (read_adapter(folder).tensors for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_the_defaults_of_the_command_line_are_the_notebooks():
    args = lora_in_practice.build_parser().parse_args(["finetune", "--assets", "embedded"])
    for defaults in (LoRASettings(), LoRASettings().training):
        flags = [each.name for each in fields(defaults) if "help" in each.metadata]
        assert flags and all(getattr(args, name) == getattr(defaults, name) for name in flags)


def test_every_command_has_help(capsys):
    for name in ("finetune", "evaluate", "classify", "merge", "export-peft", "compare"):
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0 and "--" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["classify", "--adapter", "nowhere", "hello"], "no lora.json in nowhere"),
    (["finetune", "--targets", "querry"], "querry"),
    (["finetune", "--rank", "0"], "rank"),
    (["compare", "--methods", "prompt"], "--methods"),
])
def test_what_the_reader_can_mend_ends_with_a_message(params, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_classification_does_not_depend_on_the_company(params, tokenizer):
    model, _ = build_classifier("tiny")
    model.eval()
    before = state(model)
    texts = ["see you", "win a prize now and call", "ok"]
    together = classify(model, texts, tokenizer, CPU)
    alone = [classify(model, [text], tokenizer, CPU)[0] for text in texts]
    assert [a["label"] for a in together] == [a["label"] for a in alone]
    assert [a["probability"] for a in together] == pytest.approx([a["probability"] for a in alone], abs=2e-4)
    assert same_state(model, before)


def test_messages_are_cut_and_empty_ones_refused(tokenizer):
    encoded = encode_messages(["Every effort moves you", "<|endoftext|>"], tokenizer, 3)
    assert encoded[0].tolist() == [6109, 3626, 6100] and encoded[1].dtype == np.int32
    assert len(encoded[1]) == 3  # plain text, not the special token
    with pytest.raises(ValueError, match="message 1 is empty"):
        encode_messages(["you", ""], tokenizer, 3)
