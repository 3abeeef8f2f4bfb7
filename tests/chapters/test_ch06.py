"""Chapter 6: the spam data, the classification head, fine-tuning, and using the classifier."""

import math
import re
from copy import deepcopy
from functools import partialmethod
from io import StringIO

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import ch05
import ch06
from book_assets import Choice
from ch04 import GPTModel

LINES = {
    "s": r"Ep \d+ \(Step \d{6}\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}",
    "e": r"Training accuracy: \d+\.\d\d% \| Validation accuracy: \d+\.\d\d%",
}


class Answers(nn.Module):
    """A fake classifier: it always gives `logits` at the last position and the opposite elsewhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, in_idx):
        outputs = -self.logits.expand(*in_idx.shape, 2)
        return torch.cat((outputs[:, :-1], -outputs[:, -1:]), dim=1)


@pytest.fixture
def classifier(tiny_config):
    torch.manual_seed(123)
    return ch06.add_classification_head(GPTModel(tiny_config)).eval()


@pytest.fixture
def messages(book_data):
    return ch06.read_messages(book_data / "sms_spam_collection" / "SMSSpamCollection")


def frame(ham, spam):
    rows = [("ham", f"h{i}") for i in range(ham)] + [("spam", f"s{i}") for i in range(spam)]
    return pd.DataFrame(rows, columns=["Label", "Text"])


def toy_loader(tokenizer):
    csv = "Label,Text\n0,See you at six\n1,Buy now\n0,At home\n1,Buy it\n1,Now buy two\n"
    return DataLoader(ch06.SpamDataset(StringIO(csv), tokenizer), batch_size=2)


def test_the_collection_has_5574_lines_that_are_read_as_5572_messages(book_data, messages):
    text = (book_data / "sms_spam_collection" / "SMSSpamCollection").read_text(encoding="utf-8")
    assert text.count("\n") == 5574
    assert messages["Label"].value_counts().to_dict() == {"ham": 4825, "spam": 747}


def test_the_real_messages_give_the_books_splits_and_batches(messages, tokenizer, tmp_path):
    balanced = ch06.create_balanced_dataset(messages)
    assert balanced["Label"].value_counts().to_dict() == {"ham": 747, "spam": 747}
    balanced["Label"] = balanced["Label"].map({"ham": 0, "spam": 1})
    parts = ch06.random_split(balanced, 0.7, 0.1)
    assert [len(part) for part in parts] == [1045, 149, 300]
    datasets, max_length = [], None
    for number, part in enumerate(parts):
        part.to_csv(tmp_path / f"{number}.csv", index=None)
        datasets.append(ch06.SpamDataset(tmp_path / f"{number}.csv", tokenizer, max_length))
        max_length = datasets[0].max_length
    assert {dataset.max_length for dataset in datasets} == {120}
    assert (datasets[0].input_ids != 50256).sum(dim=1).float().mean() == pytest.approx(30.4, abs=0.05)
    train_loader = DataLoader(datasets[0], batch_size=8, shuffle=True, drop_last=True)
    assert next(iter(train_loader))[0].shape == (8, 120)
    others = [len(DataLoader(dataset, batch_size=8)) for dataset in datasets[1:]]
    assert [len(train_loader), *others] == [130, 19, 38]


def test_37_real_test_messages_are_also_in_the_training_part(messages):
    train, validation, test = ch06.random_split(ch06.create_balanced_dataset(messages), 0.7, 0.1)
    assert [part["Text"].isin(train["Text"]).sum() for part in (validation, test)] == [13, 37]


def test_balancing_draws_the_books_ham_and_keeps_the_spam_in_order(messages):
    ham, spam = (messages[messages["Label"] == label] for label in ("ham", "spam"))
    expected = pd.concat([ham.sample(747, random_state=123), spam])
    pd.testing.assert_frame_equal(ch06.create_balanced_dataset(messages), expected)


@pytest.mark.parametrize("text", ["NA", "null", "123", "nan"])
def test_a_message_that_pandas_would_take_for_something_else_stays_text(text, tokenizer):
    df = ch06.read_messages(StringIO(f"ham\tHello\nspam\t{text}\n"))
    assert df["Text"].tolist() == ["Hello", text]
    dataset = ch06.SpamDataset(StringIO(f"Label,Text\n1,{text}\n"), tokenizer)
    assert dataset.input_ids[0].tolist() == tokenizer.encode(text)


def test_a_file_with_other_labels_is_refused_and_the_labels_are_named():
    with pytest.raises(ValueError, match=r"\['junk'\].*a label, a tab and a message"):
        ch06.read_messages(StringIO("ham\tHello\njunk\tHi\n"))


def test_the_printed_download_call_reaches_the_one_downloader(monkeypatch):
    calls = []
    monkeypatch.setattr(ch06, "fetch_spam_data", lambda *args: calls.append(args))
    ch06.download_and_unzip_spam_data("https://url", "a.zip", "folder", "folder/file.tsv")
    assert calls == [("https://url", "a.zip", "folder", "folder/file.tsv")]


def test_load_messages_reads_the_data_of_the_choice_and_no_other(monkeypatch, tmp_path):
    (tmp_path / "embedded.tsv").write_text("ham\tours\n", encoding="utf-8")
    monkeypatch.setattr(ch06, "EMBEDDED_MESSAGES", tmp_path / "embedded.tsv")
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))

    def fetch(url, zip_path, extracted_path, data_file_path):
        assert url is None and extracted_path == tmp_path / "sms_spam_collection"
        extracted_path.mkdir()
        data_file_path.write_text("spam\ttheirs\n", encoding="utf-8")

    monkeypatch.setattr(ch06, "download_and_unzip_spam_data", fetch)
    assert ch06.load_messages(Choice("book", "embedded"))["Text"].tolist() == ["ours"]
    assert ch06.load_messages(Choice("embedded", "book"))["Text"].tolist() == ["theirs"]


@pytest.mark.parametrize(("ham", "spam"), [(9, 4), (4, 9), (4, 4)])
def test_balancing_keeps_as_many_of_each_class_whichever_is_larger(ham, spam):
    balanced = ch06.create_balanced_dataset(frame(ham, spam))
    assert balanced["Label"].tolist() == ["ham"] * 4 + ["spam"] * 4
    assert balanced["Text"].is_unique


def test_balancing_needs_both_words_as_labels():
    with pytest.raises(ValueError, match=r"\[0, 1\] are not among \['ham', 'spam'\].*before mapping"):
        ch06.create_balanced_dataset(pd.DataFrame({"Label": [0, 1], "Text": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"a class of \['ham', 'spam'\] has no rows"):
        ch06.create_balanced_dataset(frame(3, 0))


@pytest.mark.parametrize("fractions", [(0.7, 0.1), (0.8, 0.2), (1.0, 0.0), (0.0, 0.0), (0.9, 0.1)])
def test_a_split_loses_and_repeats_no_message(fractions):
    df = frame(13, 10)
    parts = ch06.random_split(df, *fractions)
    assert sorted(pd.concat(parts)["Text"]) == sorted(df["Text"])
    assert [len(part) for part in parts[:2]] == [int(23 * fraction) for fraction in fractions]
    assert all(a.equals(b) for a, b in zip(parts, ch06.random_split(df, *fractions), strict=True))


@pytest.mark.parametrize("fractions", [(0.9, 0.2), (-0.1, 0.5), (0.5, -0.1), (7, 1)])
def test_fractions_that_cannot_be_cut_are_an_error(fractions):
    with pytest.raises(ValueError, match="must not be negative, nor exceed 1"):
        ch06.random_split(frame(5, 5), *fractions)


def test_messages_are_padded_to_the_longest_or_cut_to_max_length(tokenizer):
    csv = "Label,Text\n0,See you at six\n1,Call now\n"
    ids = [tokenizer.encode(text) for text in ("See you at six", "Call now")]
    dataset = ch06.SpamDataset(StringIO(csv), tokenizer)
    assert dataset.max_length == 4
    assert dataset.input_ids.tolist() == [ids[0], ids[1] + [50256] * 2]
    dataset = ch06.SpamDataset(StringIO(csv), tokenizer, max_length=3, pad_token_id=0)
    assert dataset.input_ids.tolist() == [ids[0][:3], [*ids[1], 0]]
    inputs, label = dataset[1]
    assert (inputs.dtype, label.dtype, label.item(), len(dataset)) == (torch.int64, torch.int64, 1, 2)


def test_a_dataset_reads_what_to_csv_wrote_quotes_and_line_breaks_included(tokenizer, tmp_path):
    texts = ['He said "six", not seven', "two\nlines", "£5, please"]
    pd.DataFrame({"Label": [0, 0, 1], "Text": texts}).to_csv(tmp_path / "train.csv", index=None)
    for csv_file in (tmp_path / "train.csv", str(tmp_path / "train.csv")):
        dataset = ch06.SpamDataset(csv_file, max_length=None, tokenizer=tokenizer)
        assert dataset.data["Text"].tolist() == texts


@pytest.mark.parametrize(("csv", "message"), [
    ("Label,Message\n0,Hi\n", "must have the columns Label and Text.*'Message'"),
    ("0,Hi\n1,Win\n", "must have the columns Label and Text"),
    ("Label,Text\nham,Hi\nspam,Win\n", r"\['ham', 'spam'\].*map"),
    ("Label,Text\n0,Hi\n-1,Win\n", r"\['-1'\] are not class numbers"),
    ("Label,Text\n0,Hi\n1.0,Win\n", r"\['1.0'\] are not class numbers"),
    ("Label,Text\n0,Hi\n1,\n0,  \n", r"no text in rows \[1, 2\]"),
    ("Label,Text\n", "no messages"),
    ("", "is empty"),
])
def test_a_file_that_cannot_be_trained_on_is_refused_with_the_reason(csv, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        ch06.SpamDataset(StringIO(csv), tokenizer)


def test_a_max_length_below_one_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="max_length 0"):
        ch06.SpamDataset(StringIO("Label,Text\n0,Hi\n"), tokenizer, max_length=0)


def test_a_special_tokens_name_in_a_message_is_plain_text(tokenizer):
    ids = ch06.encode_message("Win <|endoftext|>", tokenizer)
    assert 50256 not in ids and tokenizer.decode(ids) == "Win <|endoftext|>"


def test_padding_beyond_the_models_context_is_an_error_in_the_model(classifier, tokenizer):
    dataset = ch06.SpamDataset(StringIO("Label,Text\n0,Hi\n"), tokenizer, max_length=65)
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        classifier(dataset.input_ids)


@pytest.mark.parametrize("width", [8, 32])
def test_the_head_is_as_wide_as_the_model(tiny_config, width):
    model = ch06.add_classification_head(GPTModel(tiny_config | {"emb_dim": width}), num_classes=3)
    assert model.out_head.weight.shape == (3, width)
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 3)


def test_only_the_last_block_the_final_norm_and_the_head_are_trained(classifier):
    ch06.unfreeze_last_block(classifier)
    for name, parameter in classifier.named_parameters():
        assert parameter.requires_grad == name.startswith(("trf_blocks.1.", "final_norm.", "out_head.")), name


def test_the_loss_is_the_cross_entropy_of_the_last_tokens_logits(classifier):
    inputs, targets = torch.randint(0, 50257, (3, 7)), torch.tensor([1, 0, 1])
    log_p = torch.log_softmax(classifier(inputs)[:, -1], dim=-1)
    loss = ch06.calc_loss_batch(inputs, targets, classifier, "cpu")
    torch.testing.assert_close(loss, -log_p[torch.arange(3), targets].mean())
    assert loss.requires_grad


def test_losses_are_means_over_batches(tokenizer):
    model, loader = Answers([0.0, 2.0]), toy_loader(tokenizer)
    right, wrong = -torch.log_softmax(model.logits, dim=-1).detach().flip(0)
    mixed = (right + wrong).item() / 2  # batches have the labels 0 1, 0 1 and 1
    expected = (2 * mixed + right.item()) / 3
    assert ch06.calc_loss_loader(loader, model, "cpu") == pytest.approx(expected)
    assert ch06.calc_loss_loader(loader, model, "cpu", num_batches=1) == pytest.approx(mixed)
    assert ch06.evaluate_model(model, loader, loader, "cpu", 3) == pytest.approx((expected, expected))
    assert model.training


@pytest.mark.parametrize(("logits", "num_batches", "fraction"), [
    ([0.0, 1.0], None, 3 / 5), ([1.0, 0.0], None, 2 / 5), ([0.0, 1.0], 2, 2 / 4), ([0.0, 1.0], 99, 3 / 5),
])
def test_a_constant_answer_is_as_accurate_as_its_class_is_frequent(tokenizer, logits, num_batches, fraction):
    model = Answers(logits)
    assert ch06.calc_accuracy_loader(toy_loader(tokenizer), model, "cpu", num_batches) == fraction
    assert not model.training
    assert str(ch06.calc_accuracy_loader([], model, "cpu", num_batches)) == "nan"


@pytest.mark.parametrize("mean", [ch06.calc_accuracy_loader, ch06.calc_loss_loader])
def test_no_batches_give_nan_and_none_means_all(tokenizer, mean):
    model, loader = Answers([0.0, 1.0]), toy_loader(tokenizer)
    assert math.isnan(mean(loader, model, "cpu", num_batches=0))
    assert mean(loader, model, "cpu", num_batches=None) == mean(loader, model, "cpu", num_batches=len(loader))


def fine_tune(model, loader, num_epochs=1, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return ch06.train_classifier_simple(
        model, loader, loader, optimizer, torch.device("cpu"), num_epochs, eval_freq=2, eval_iter=3, **options
    )


def test_training_learns_prints_the_books_lines_and_returns_five_results(classifier, tokenizer, capsys):
    results = fine_tune(classifier, toy_loader(tokenizer), num_epochs=3, tokenizer=tokenizer)
    train_losses, val_losses, train_accs, val_accs, examples_seen = results
    assert len(train_losses) == len(val_losses) == 5  # at steps 0, 2, 4, 6, 8
    assert len(train_accs) == len(val_accs) == 3 and examples_seen == 3 * 5
    assert train_losses == val_losses and val_losses[-1] < val_losses[0] / 2  # one loader for both
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Ep 1 (Step 000000): Train loss {train_losses[0]:.3f}, Val loss {val_losses[0]:.3f}"
    assert lines[-1] == f"Training accuracy: {train_accs[-1]:.2%} | Validation accuracy: {val_accs[-1]:.2%}"
    assert all(re.fullmatch(LINES[kind], line) for kind, line in zip("ssesesse", lines, strict=True))


def test_the_bar_can_be_silenced_and_changes_no_result(classifier, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(ch06.tqdm, "__init__", partialmethod(ch06.tqdm.__init__, disable=False))
    results = []
    for variable, progress, bars in (("", True, 1), ("", False, 0), ("1", True, 0)):
        monkeypatch.setenv("TQDM_DISABLE", variable)
        results.append(fine_tune(deepcopy(classifier), toy_loader(tokenizer), progress=progress))
        assert ("epoch 1" in capsys.readouterr().err) == bars
    assert results[0] == results[1] == results[2]


def test_frozen_weights_stay_as_they_were(classifier, tokenizer):
    ch06.unfreeze_last_block(classifier)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    fine_tune(classifier, toy_loader(tokenizer), progress=False)
    for name, parameter in classifier.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_a_plot_is_returned_closed_and_saved_only_where_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    epochs, examples = torch.linspace(0, 2, 3), torch.linspace(0, 80, 3)
    figure = ch06.plot_values(epochs, examples, [0.9, 0.5, 0.2], [0.9, 0.6, 0.4])
    assert plt.get_fignums() == [] and list(tmp_path.iterdir()) == []
    assert [axes.get_xlabel() for axes in figure.axes] == ["epochs", "examples seen"]
    ch06.plot_values(epochs, examples, [0, 0, 1], [0, 0, 1], label="accuracy", save_as="accuracy.pdf")
    assert (tmp_path / "accuracy.pdf").stat().st_size > 0


@pytest.mark.parametrize(("logits", "label"), [([0.0, 1.0], "spam"), ([1.0, 0.0], "not spam")])
@pytest.mark.parametrize("max_length", [None, 1, 10, 64, 120])
def test_every_text_gets_one_of_two_labels(classifier, tokenizer, logits, label, max_length):
    nn.init.zeros_(classifier.out_head.weight)
    classifier.out_head.bias.data = torch.tensor(logits)
    for text in ("Hi", "one two three", "more words than the context holds " * 40, "<|endoftext|>"):
        assert ch06.classify_review(text, classifier, tokenizer, "cpu", max_length) == label


@pytest.mark.parametrize(("max_length", "expected"), [
    (None, [14134, 783]), (1, [14134]), (4, [14134, 783, 50256, 50256]), (99, [14134, 783] + [50256] * 62),
])
def test_a_text_is_cut_and_padded_as_in_training(classifier, tokenizer, max_length, expected):
    seen = []
    classifier.register_forward_hook(lambda model, args, output: seen.append(args[0].tolist()))
    ch06.classify_review("Call now", classifier.train(), tokenizer, "cpu", max_length)
    assert seen == [[expected]] and not classifier.training


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_cannot_be_classified(classifier, tokenizer, text):
    with pytest.raises(ValueError, match="no text"):
        ch06.classify_review(text, classifier, tokenizer, "cpu")


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_saved_classifier_comes_back_with_its_max_length(tiny_config, tmp_path, num_classes):
    model = ch06.add_classification_head(GPTModel(tiny_config), num_classes).eval()
    ch06.save_classifier(tmp_path / "spam.pth", model, tiny_config, max_length=48)
    loaded, max_length = ch06.load_classifier(tmp_path / "spam.pth")
    assert torch.equal(loaded(torch.arange(20)[None]), model(torch.arange(20)[None]))
    assert max_length == 48 and not loaded.training


def test_only_a_plain_classifier_is_saved_and_loaded_as_one(classifier, tiny_config, tmp_path):
    classifier.trf_blocks[0].att.W_query = nn.ModuleDict({"lora": nn.Linear(2, 2)})
    for model, remedy in ((GPTModel(tiny_config), "add_classification_head"), (classifier, "merge_lora")):
        with pytest.raises(ValueError, match=f"{remedy} first"):
            ch06.save_classifier(tmp_path / "spam.pth", model, tiny_config, max_length=48)
    ch05.save_checkpoint(tmp_path / "gpt.pth", GPTModel(tiny_config), tiny_config)
    with pytest.raises(ValueError, match=r"no classifier: use ch05\.load_checkpoint"):
        ch06.load_classifier(tmp_path / "gpt.pth")


def test_a_missing_or_foreign_file_is_a_clear_error(classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ch06.load_classifier(tmp_path / "none.pth")
    torch.save(classifier.state_dict(), tmp_path / "state.pth")
    (tmp_path / "page.pth").write_text("<html>not a checkpoint</html>", encoding="utf-8")
    for name in ("state.pth", "page.pth"):
        with pytest.raises(ValueError, match=re.escape(name)):
            ch06.load_classifier(tmp_path / name)
