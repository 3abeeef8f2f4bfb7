"""Chapter 6 with any number of classes, and without padding."""

import math
from io import StringIO

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

import ch06
from ch04 import GPTModel

CPU = torch.device("cpu")
TOPICS = {"sport": 0, "weather": 1, "trade": 2}
WORDS = {"sport": "ball goal team", "weather": "rain wind snow", "trade": "price sale shop"}


@pytest.fixture
def topics(tmp_path):
    """A tab-separated file of three classes, of 6, 9 and 8 messages."""
    lines = [
        f"{label}\t{word} number {n}"
        for (label, words), size in zip(WORDS.items(), (2, 3, 3), strict=True)
        for word in words.split() for n in range(size)
    ]
    (tmp_path / "topics.tsv").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    return tmp_path / "topics.tsv"


def test_three_classes_from_the_file_to_a_saved_classifier(topics, tiny_config, tokenizer, tmp_path):
    messages = ch06.read_messages(topics, labels=TOPICS)
    balanced = ch06.create_balanced_dataset(messages, labels=TOPICS)
    assert balanced["Label"].tolist() == [label for label in TOPICS for _ in range(6)]
    balanced["Label"] = balanced["Label"].map(TOPICS)
    train, _, _ = ch06.random_split(balanced, 1.0, 0.0)
    train.to_csv(tmp_path / "train.csv", index=None)
    dataset = ch06.SpamDataset(tmp_path / "train.csv", tokenizer)
    assert sorted(set(dataset.labels.tolist())) == [0, 1, 2]
    torch.manual_seed(0)
    model = ch06.add_classification_head(GPTModel(tiny_config), num_classes=3)
    loader = DataLoader(dataset, batch_size=6, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    accuracies = ch06.train_classifier_simple(model, loader, loader, optimizer, CPU, 12, 9, None)[2]
    assert accuracies[-1] == ch06.calc_accuracy_loader(loader, model, CPU) > 0.9
    ch06.save_classifier(tmp_path / "topics.pth", model, tiny_config, dataset.max_length)
    loaded, length = ch06.load_classifier(tmp_path / "topics.pth")
    texts = {label: f"{words.split()[0]} number 1" for label, words in WORDS.items()}
    answers = [
        ch06.classify_review(text, loaded, tokenizer, CPU, length, classes=(*TOPICS,))
        for text in texts.values()
    ]
    assert answers == list(TOPICS)


def test_a_head_of_another_number_of_classes_is_refused_rather_than_misnamed(tiny_gpt, tokenizer):
    ch06.add_classification_head(tiny_gpt, num_classes=3)
    with pytest.raises(ValueError, match="the head has 3 classes, not 2: name them with classes="):
        ch06.classify_review("Hi", tiny_gpt, tokenizer, CPU)
    with pytest.raises(ValueError, match="3 classes, not 4"):
        ch06.classify_review("Hi", tiny_gpt, tokenizer, CPU, classes="abcd")


@pytest.mark.parametrize("label", [2, -1, -100])
@pytest.mark.parametrize("measure", [ch06.calc_loss_loader, ch06.calc_accuracy_loader])
def test_a_label_without_an_output_is_refused(tiny_gpt, measure, label):
    batch = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, label])
    with pytest.raises(ValueError, match=rf"labels \[0, {label}\], but the head has 2 classes"):
        measure([batch], ch06.add_classification_head(tiny_gpt), CPU)


def test_the_answers_of_a_diverged_model_are_no_accuracy_and_no_label(tiny_gpt, tokenizer):
    ch06.add_classification_head(tiny_gpt).out_head.bias.data[:] = math.nan
    with pytest.raises(ValueError, match="answers NaN"):
        ch06.classify_review("Hi", tiny_gpt, tokenizer, CPU)
    with pytest.raises(ValueError, match="answers NaN"):
        ch06.calc_accuracy_loader([(torch.tensor([[1]]), torch.tensor([0]))], tiny_gpt, CPU)


@pytest.mark.parametrize("num_classes", [1, 0, -1])
def test_a_head_needs_two_classes(tiny_gpt, num_classes):
    with pytest.raises(ValueError, match="at least 2"):
        ch06.add_classification_head(tiny_gpt, num_classes)


def test_labels_of_other_names_are_refused_with_the_keyword():
    df = pd.DataFrame({"Label": ["sport"], "Text": ["goal"]})
    with pytest.raises(ValueError, match=r"\['sport'\] are not among \['ham', 'spam'\].* with labels="):
        ch06.create_balanced_dataset(df)


@pytest.mark.parametrize(("ham", "spam"), [(9, 4), (4, 9), (4, 4)])
def test_ham_and_spam_are_sampled_as_ever(ham, spam):
    rows = [("ham", f"h{n}") for n in range(ham)] + [("spam", f"s{n}") for n in range(spam)]
    df = pd.DataFrame(rows, columns=["Label", "Text"])
    first, second = (df[df["Label"] == label] for label in ("ham", "spam"))
    if spam > 4:
        second = second.sample(4, random_state=123)
    expected = pd.concat([first.sample(4, random_state=123), second])
    pd.testing.assert_frame_equal(ch06.create_balanced_dataset(df), expected)


# Without padding


def test_an_unpadded_classifier_answers_at_each_texts_last_token(tiny_gpt, tiny_config, tokenizer, tmp_path):
    model = ch06.add_classification_head(tiny_gpt).eval()
    ch06.save_classifier(tmp_path / "spam.pth", model, tiny_config, max_length=None)
    loaded, max_length = ch06.load_classifier(tmp_path / "spam.pth")
    assert max_length is None
    seen = []
    loaded.register_forward_hook(lambda model, args, output: seen.append((args[0], output[0, -1])))
    for text in ("Hi", "Win a prize now", "many words " * 90):
        answer = ch06.classify_review(text, loaded, tokenizer, CPU, max_length)
        ids, logits = seen[-1]
        assert ids[0].tolist() == tokenizer.encode(text)[:64]
        assert answer == ("not spam", "spam")[logits.argmax()]


@pytest.mark.parametrize("max_length", [0, -3, 10.5, "5", math.nan])
def test_a_max_length_that_is_no_number_of_tokens_is_refused_everywhere(
    tiny_gpt, tiny_config, tokenizer, tmp_path, max_length
):
    model = ch06.add_classification_head(tiny_gpt)
    for call in (
        lambda: ch06.classify_review("Hi", model, tokenizer, CPU, max_length),
        lambda: ch06.SpamDataset(StringIO("Label,Text\n0,Hi\n"), tokenizer, max_length),
        lambda: ch06.save_classifier(tmp_path / "spam.pth", model, tiny_config, max_length),
    ):
        with pytest.raises(ValueError, match=r"max_length .*: use at least 1 token, or None"):
            call()


# Files


@pytest.mark.parametrize("content", [
    "Label,Text\n0,£5\n".encode("latin-1"), "Label,Text\n0,Hi\n".encode("utf-16"), bytes(range(256)),
    b'Label,Text\n0,"Hi\n1,Win\n',
])
def test_a_file_that_is_no_csv_in_utf8_is_named_with_the_remedy(content, tokenizer, tmp_path):
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.csv is empty or no CSV file in UTF-8 .*: write the split"):
        ch06.SpamDataset(tmp_path / "train.csv", tokenizer)


def test_a_fraction_that_is_no_number_is_refused():
    for fractions in ((math.nan, 0.1), (0.1, math.nan), (math.inf, 0.1)):
        with pytest.raises(ValueError, match="must not be negative, nor exceed 1"):
            ch06.random_split(pd.DataFrame({"Text": range(9)}), *fractions)
