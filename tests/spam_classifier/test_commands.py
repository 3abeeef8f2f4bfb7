"""The commands of lora_in_practice."""

import io
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import ch06
import lora_in_practice
from lora.adapters import read_adapter
from lora.layers import adapted_layers
from lora.peft_format import import_peft
from lora_in_practice import main
from spam_classifier import classifier
from spam_classifier.classifier import LoRASettings, classify, load_classifier_adapter

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("stand_ins")


def run_finetune(capsys, *options):
    main(["finetune", "--epochs", "2", "--learning-rate", "0.01", "--rank", "2", *options])
    return capsys.readouterr().out


@pytest.mark.usefixtures("bf16_processor")
def test_finetune_writes_an_adapter_that_every_command_reads(capsys, monkeypatch):
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
    monkeypatch.setenv("LLM_ASSETS", "book")  # evaluate takes what the adapter's notes say
    main(["evaluate"])
    out = capsys.readouterr().out
    assert out.startswith("model=embedded") and "test messages" in out and "row true, column predicted" in out
    main(["export-peft"])
    main(["merge"])
    model, _, _ = load_classifier_adapter("adapter", CPU)
    merged, max_length = ch06.load_classifier("classifier.pth")
    ids = torch.arange(12)[None]
    assert not adapted_layers(merged) and max_length is None  # read at the last token, not at padding
    torch.testing.assert_close(merged(ids), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [
    ["dora"], ["dora", "lora+"], ["rslora", "lora-fa"], ["vera"], ["adalora"], ["pissa", "rslora"],
    ["olora"], ["delta-lora"],
], ids=" ".join)
def test_an_adapter_of_a_variant_says_so_and_every_command_reads_it(names, capsys):
    run_finetune(capsys, "--variant", *names)
    adapter = read_adapter("adapter")
    assert adapter.notes["settings"]["variant"] == names
    branch = {settings.get("variant", "lora") for settings in adapter.layers.values()}
    assert branch == {next(name for name in names if name not in ("lora+", "rslora"))}
    main(["classify", "win a prize now"])
    main(["evaluate"])
    assert "row true, column predicted" in capsys.readouterr().out
    main(["merge"])
    model, _, _ = load_classifier_adapter("adapter", CPU)
    ids = torch.arange(12)[None]
    merged, _ = ch06.load_classifier("classifier.pth")
    torch.testing.assert_close(merged(ids), model(ids), atol=1e-5, rtol=1e-5)
    main(["export-peft"])
    back = import_peft(classifier.build_classifier("124M")[0], "adapter-peft").eval()
    torch.testing.assert_close(back(ids), model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("names", "message"), [
    (["dora", "vera"], "error: dora and vera are two branches for one layer: choose one"),
    (["lora+", "lora-fa"], "error: lora-fa with lora+: LoRA-FA trains B alone"),
    (["vera", "rslora"], "error: vera with rslora: "),
    (["rslora", "--scaling", "alpha/rank"], "error: rslora means scaling="),
    (["delta-lora", "--dropout", "0.1"], "error: Delta-LoRA has no dropout"),
])
def test_variants_that_make_no_sense_together_are_one_line_and_no_adapter(names, message):
    with pytest.raises(SystemExit) as end:
        main(["finetune", "--rank", "2", "--variant", *names])
    assert end.value.code.startswith(message) and "\n" not in end.value.code
    assert not Path("adapter", "lora.safetensors").exists()


def test_the_fast_paths_options_reach_the_training(capsys, monkeypatch):
    seen, fit = [], classifier.fit
    monkeypatch.setattr(classifier, "fit", lambda *args: seen.append(args[2]) or fit(*args))
    options = ["--precision", "bf16", "--gradient-accumulation-steps", "2", "--gradient-checkpointing"]
    out = run_finetune(capsys, *options)
    settings = seen[0]
    assert settings.precision == "bf16" and settings.gradient_accumulation_steps == 2
    assert settings.gradient_checkpointing and not settings.compile
    assert "s of training" in out
    with pytest.raises(SystemExit):
        run_finetune(capsys, "--precision", "int3")


def test_an_adapter_trained_on_either_processor_is_read_by_chapter_6(capsys, tokenizer, bf16_processor):
    run_finetune(capsys, "--precision", "auto")
    model, _, _ = load_classifier_adapter("adapter", CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    text = "win a prize now, number 3"
    answer = classify(model, [text], tokenizer, CPU)[0]
    assert ch06.classify_review(text, model, tokenizer, CPU) == answer["label"]


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(capsys):
    folders = []
    for number, seed in enumerate(("1", "1", "2")):
        folders.append(f"adapter{number}")
        run_finetune(capsys, "--seed", seed, "--output", folders[-1])
    a, b, c = (read_adapter(folder).tensors for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_the_defaults_of_the_flags_are_those_of_the_settings():
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
    (["classify", "--adapter", "nowhere", "hello"], "no lora.safetensors in nowhere"),
    (["finetune", "--targets", "querry"], "querry"),
    (["finetune", "--rank", "0"], "rank"),
    (["compare", "--methods", "prompt"], "--methods"),
    (["classify", " "], "there is no message"),
])
def test_user_errors_end_with_a_message_instead_of_a_traceback(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)
