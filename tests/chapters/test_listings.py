"""The printed listings E.1 to E.7 run as they are, with stand-ins for what cannot be downloaded here."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch

import appendix_e
import listings
from book_assets.table import REPOSITORY
from notebooks import ABRIDGED, definitions, source, tagged

LISTINGS = REPOSITORY / "appendix-E" / "listings.py"
TIKTOKEN_NAMES = {  # of the two files in tiktoken's cache
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
# Runs listings.py, unchanged, with random weights of GPT-2 small's width with `layers` blocks and on
# `messages` short messages of each kind (0: all messages).
STAND_INS = """
import runpy, sys
import numpy as np
import ch04, ch06, gpt_download

script, layers, messages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
GPTModel, random_split = ch04.GPTModel, ch06.random_split
rng = np.random.default_rng(0)

def weights(*shape):
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

def block():
    def layer(d_in, d_out):
        return {"w": weights(d_in, d_out), "b": weights(d_out)}
    def norm():
        return {"g": np.ones(768, np.float32), "b": weights(768)}
    return {"attn": {"c_attn": layer(768, 3 * 768), "c_proj": layer(768, 768)},
            "mlp": {"c_fc": layer(768, 4 * 768), "c_proj": layer(4 * 768, 768)},
            "ln_1": norm(), "ln_2": norm()}

def random_gpt2(model_size, models_dir):
    assert (model_size, models_dir) == ("124M", "gpt2")
    params = {"wte": weights(50257, 768), "wpe": weights(1024, 768), "g": np.ones(768, np.float32),
              "b": weights(768), "blocks": [block() for _ in range(layers)]}
    return {}, params

def few_messages(df, train_frac, validation_frac):
    if messages:
        df = df[df["Text"].str.len() < 70].groupby("Label").head(messages)
    return random_split(df, train_frac, validation_frac)

gpt_download.download_and_load_gpt2 = random_gpt2
ch06.random_split = few_messages
ch04.GPTModel = lambda cfg: GPTModel({**cfg, "n_layers": layers})
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def folder(book_data, tmp_path):
    """A reader's folder in which the messages and the tokenizer's files have been downloaded."""
    target = tmp_path / "sms_spam_collection" / "SMSSpamCollection.tsv"
    target.parent.mkdir()
    shutil.copyfile(book_data / "sms_spam_collection" / "SMSSpamCollection", target)
    (tmp_path / "tiktoken").mkdir()
    for name, cached in TIKTOKEN_NAMES.items():
        shutil.copyfile(REPOSITORY / "ch05" / "gpt2-tiny" / name, tmp_path / "tiktoken" / cached)
    (tmp_path / "stand_ins.py").write_text(STAND_INS, encoding="utf-8")
    return tmp_path


def run_listings(folder, layers, messages):
    environment = os.environ | {
        "LLM_CACHE_DIR": str(folder), "TIKTOKEN_CACHE_DIR": str(folder / "tiktoken"),
        "PYTHONIOENCODING": "utf-8",
    }
    result = subprocess.run(
        [sys.executable, "stand_ins.py", str(LISTINGS), str(layers), str(messages)],
        cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def accuracies(printed):
    """The (training, validation, test) percentages of the three reports: at first, with LoRA, at the end."""
    reports = re.findall(
        r"^Training accuracy: (\S+)%\nValidation accuracy: (\S+)%\nTest accuracy: (\S+)%",
        printed, re.MULTILINE,
    )
    assert len(reports) == 3
    return [tuple(float(value) for value in report) for report in reports]


def test_the_listings_run_unchanged_on_a_few_messages(folder):
    printed = run_listings(folder, layers=1, messages=20)
    assert "3 training batches\n1 validation batches\n1 test batches" in printed
    assert "Every effort moves you" in printed
    at_first, with_lora, _ = accuracies(printed)
    assert at_first == with_lora  # B is zero
    one_block = 4 * 768**2 + 4 * 768 + 8 * 768**2 + 5 * 768 + 4 * 768
    everything = (50257 + 1024) * 768 + one_block + 2 * 768 + 768 * 2 + 2
    lora = 16 * (4 * (768 + 768) + 2 * (768 + 4 * 768) + (768 + 2))
    assert f"Total trainable parameters before: {everything:,}\n" in printed
    assert "Total trainable parameters after: 0\n" in printed
    assert f"Total trainable LoRA parameters: {lora:,}\n" in printed
    assert "(lora): LoRALayer()\n" in printed
    assert "Ep 1 (Step 000000): Train loss" in printed
    assert len(re.findall(r"Training accuracy: \S+% \| Validation accuracy", printed)) == 5
    assert sorted(path.name for path in folder.glob("*.csv")) == ["test.csv", "train.csv", "validation.csv"]


@pytest.mark.slow
def test_the_listings_run_unchanged_on_all_messages(folder):
    printed = run_listings(folder, layers=1, messages=0)
    assert "Input batch dimensions: torch.Size([8, 120])\n" in printed
    assert "130 training batches\n19 validation batches\n38 test batches" in printed
    steps = re.findall(r"Ep \d \(Step (\d+)\)", printed)
    assert steps == [f"{step:06d}" for step in range(0, 650, 50)]
    at_first, with_lora, _ = accuracies(printed)
    assert at_first == with_lora


def test_importing_the_listings_neither_downloads_nor_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    defined = runpy.run_path(str(LISTINGS), run_name="listings")
    assert {"LoRALayer", "LinearWithLoRA", "replace_linear_with_lora"} <= defined.keys()
    assert not {"url", "df", "train_loader", "model", "optimizer"} & defined.keys()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def trained(source):
    """Return a model with LoRA of the module `source` after three steps of AdamW, and its outputs."""
    torch.manual_seed(123)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Sequential(torch.nn.Linear(8, 3)))
    appendix_e.freeze(model)
    source.replace_linear_with_lora(model, 2, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(5, 6)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, model(x)


def test_the_listings_classes_give_the_modules_numbers_bit_for_bit_in_training_too():
    (printed, printed_outputs), (ours, our_outputs) = trained(listings), trained(appendix_e)
    assert str(printed) == str(ours)
    assert torch.equal(printed_outputs, our_outputs)
    expected = printed.state_dict()
    assert expected["0.lora.B"].any() and expected.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_the_notebook_shows_the_listings_definitions_first():
    cells = [source(cell) for cell in tagged(REPOSITORY / "appendix-E" / "appendix-E.ipynb", ABRIDGED)]
    printed = definitions(LISTINGS.read_text(encoding="utf-8"))
    assert definitions("\n\n".join(cells)) == printed
    assert [len(text.splitlines()) for text in printed.values()] == [10, 9, 6]


PRINTED = """
from ch06 import (download_and_unzip_spam_data, create_balanced_dataset, random_split)
zip_path = "sms_spam_collection.zip"
extracted_path = "sms_spam_collection"
data_file_path = Path(extracted_path) / "SMSSpamCollection.tsv"
download_and_unzip_spam_data(url, zip_path, extracted_path, data_file_path)
df = pd.read_csv(data_file_path, sep="\\t", header=None, names=["Label", "Text"])
train_df, validation_df, test_df = random_split(balanced_df, 0.7, 0.1)
from chapter06 import SpamDataset
tokenizer = tiktoken.get_encoding("gpt2")
train_dataset = SpamDataset("train.csv", max_length=None, tokenizer=tokenizer)
from gpt_download import download_and_load_gpt2
from chapter04 import GPTModel
from chapter05 import load_weights_into_gpt
CHOOSE_MODEL = "gpt2-small (124M)"
settings, params = download_and_load_gpt2(model_size=model_size, models_dir="gpt2")
model = GPTModel(BASE_CONFIG)
load_weights_into_gpt(model, params)
from chapter04 import generate_text_simple
from chapter05 import text_to_token_ids, token_ids_to_text
model.out_head = torch.nn.Linear(in_features=768, out_features=num_classes)
from chapter06 import calc_accuracy_loader
train_accuracy = calc_accuracy_loader(train_loader, model, device, num_batches=10)
replace_linear_with_lora(model, rank=16, alpha=16)
from chapter06 import train_classifier_simple
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
train_losses, val_losses, train_accs, val_accs, examples_seen = train_classifier_simple(
    model, train_loader, val_loader, optimizer, device,
    num_epochs=num_epochs, eval_freq=50, eval_iter=5, tokenizer=tokenizer,
)
from chapter06 import plot_values
plot_values(epochs_tensor, examples_seen_tensor, train_losses, val_losses, label="loss")
train_accuracy = calc_accuracy_loader(train_loader, model, device)
"""


def test_the_listings_contain_the_printed_statements_in_the_printed_order():
    tree = ast.parse(LISTINGS.read_text(encoding="utf-8"))
    by_line = sorted((n for n in ast.walk(tree) if isinstance(n, ast.stmt)), key=lambda n: n.lineno)
    typed = iter([ast.dump(node) for node in by_line])
    for statement in ast.parse(PRINTED).body:
        assert ast.dump(statement) in typed, ast.unparse(statement)
