"""The main job: what it prints, what it writes, what it refuses."""

import json
import re

import pytest
import torch

import ch06
import finetune_spam
import lora_in_practice
from book_assets import Choice
from spam_classifier.classifier import classify, load_classifier_adapter


def run_main(folder, *options):
    finetune_spam.main(["--assets", "embedded", "--epochs", "2", "--output-dir", str(folder), *options])
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("stand_ins")
def test_the_main_job_reports_accuracies_and_writes_only_into_its_folder(tmp_path, capsys):
    results = run_main(tmp_path / "new" / "results", "--rank", "4", "--scaling", "alpha/rank")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "accuracy.png", "lora.safetensors", "loss.png", "results.json", "test.csv", "train.csv",
        "validation.csv",
    ]
    printed = capsys.readouterr().out
    assert re.search(r"Trainable parameters: [\d,]+ → frozen: 0 → LoRA of rank 4: [\d,]+", printed)
    for name in ("embedded", "Ep 1 (Step 000000)", "before", "after", "loss.png", "results.json"):
        assert name in printed
    assert results["settings"]["rank"] == 4 and results["settings"]["scaling"] == "alpha/rank"
    assert set(results["accuracy_after"]) == {"train", "validation", "test"}
    assert all(0 <= value <= 1 for value in results["accuracy_after"].values())
    assert results["seconds"] >= results["training_seconds"] > 0
    assert results["machine"]["torch"] == torch.__version__
    assert len(results["train_accs"]) == 2
    assert not results["settings"]["training"]["decay"]  # what listing E.7 does, not what the fast path can


@pytest.mark.usefixtures("stand_ins")
def test_the_main_job_with_the_same_seed_gives_the_same_numbers(tmp_path):
    first = run_main(tmp_path / "a", "--seed", "7")
    torch.manual_seed(1)
    second = run_main(tmp_path / "b", "--seed", "7")
    for key in ("train_losses", "val_losses", "accuracy_before", "accuracy_after"):
        assert first[key] == second[key]


def test_messages_longer_than_the_context_are_cut_to_it(tmp_path):
    splits = ch06.spam_splits(Choice.parse("embedded"))
    datasets = finetune_spam.prepare_datasets(splits, 12, tmp_path)
    assert {dataset.max_length for dataset in datasets.values()} == {12}


@pytest.mark.parametrize("option", ["--epochs", "--rank", "--batch-size"])
def test_settings_below_one_end_with_a_message(option):
    name = option[2:].replace("-", "_")
    with pytest.raises(SystemExit, match=f"error: {name} must be at least 1"):
        finetune_spam.main([option, "0"])


def test_unknown_assets_end_with_a_message_and_not_a_traceback(capsys):
    with pytest.raises(SystemExit):
        finetune_spam.main(["--assets", "nonsense"])
    assert re.search(r"--assets: .*nonsense", capsys.readouterr().err)


@pytest.mark.usefixtures("stand_ins", "bf16_processor")
def test_the_adapter_answers_as_the_printed_classifier_does(tmp_path, tokenizer, capsys):
    results = run_main(tmp_path, "--learning-rate", "0.01")
    model, _, notes = load_classifier_adapter(tmp_path, torch.device("cpu"))
    width = ch06.SpamDataset(tmp_path / "train.csv", tokenizer).max_length
    assert notes["pad_to"] == width and notes["assets"] == Choice("embedded", "embedded")
    texts = ["You won a prize, call now", "See you at eight", "Are you coming home?"]
    answers = classify(model, texts, tokenizer, torch.device("cpu"), notes["pad_to"])
    expected = [ch06.classify_review(text, model, tokenizer, "cpu", notes["pad_to"]) for text in texts]
    assert [answer["label"] for answer in answers] == expected
    capsys.readouterr()
    lora_in_practice.main(["evaluate", "--adapter", str(tmp_path)])
    accuracy = 100 * results["accuracy_after"]["test"]
    assert re.search(rf"^test messages +8 +{accuracy:.1f} % ", capsys.readouterr().out, re.MULTILINE)
