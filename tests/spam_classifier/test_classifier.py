"""Messages to token ids, predictions, adapters whose notes name their base model."""

import io
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

import ch06
from book_assets import Choice
from lora.adapters import save_adapter
from models import same_state, state, train_a_little
from spam_classifier.classifier import (
    LoRASettings,
    build_classifier,
    classify,
    encode_messages,
    encode_splits,
    finetune,
    load_classifier_adapter,
    predict_classes,
    save_classifier_adapter,
)

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")
SETTINGS = LoRASettings(rank=2, train_in_full=()).with_training(seed=7)  # the head is drawn again


def adapted_classifier():
    model, _ = build_classifier("tiny", SETTINGS.training.seed)
    return train_a_little(SETTINGS.adapt(model)).eval()


# Messages


def test_messages_are_cut_and_empty_ones_refused(tokenizer):
    encoded = encode_messages(["Every effort moves you", "<|endoftext|>"], tokenizer, 3)
    assert encoded[0].tolist() == [6109, 3626, 6100] and encoded[1].dtype == np.int32
    assert len(encoded[1]) == 3  # plain text, not the special token
    for empty in ("", " \n", None, float("nan")):
        with pytest.raises(ValueError, match="message 1 is empty"):
            encode_messages(["you", empty], tokenizer, 3)


def test_one_text_instead_of_several_and_sizes_out_of_range_are_refused(tokenizer):
    with pytest.raises(ValueError, match="a list of texts, not one text"):
        encode_messages("Every effort", tokenizer, 3)
    for max_tokens, pad_to in ((0, None), (-1, None), (3, 0), (3, 4), (3, -2)):
        with pytest.raises(ValueError, match=r"pad_to must be None or from 1 to max_tokens"):
            encode_messages(["you"], tokenizer, max_tokens, pad_to)


def test_splits_without_messages_or_with_words_as_labels_are_refused_by_name(tokenizer):
    split = pd.DataFrame({"Label": [0, 1], "Text": ["see you", "win"]})
    words = split.assign(Label=["ham", "spam"])
    for wrong in (split[:0], words, split.assign(Label=[0.5, float("nan")]), split[["Text"]]):
        with pytest.raises(ValueError, match="validation must have some rows of a Text and a Label"):
            encode_splits({"train": split, "validation": wrong}, tokenizer, 8)


def test_padded_messages_are_those_of_chapter_6s_dataset(tokenizer):
    texts = ["see you", "win a prize now and call", "ok"]
    file = io.StringIO("Label,Text\n" + "".join(f"0,{text}\n" for text in texts))
    dataset = ch06.SpamDataset(file, tokenizer, max_length=4)
    encoded = encode_messages(texts, tokenizer, max_tokens=32, pad_to=4)
    assert [ids.tolist() for ids in encoded] == [ids.tolist() for ids, _ in dataset]


# Predictions


@pytest.mark.usefixtures("stand_ins")
def test_a_prediction_does_not_depend_on_the_other_messages_of_its_batch(tokenizer):
    model, _ = build_classifier("tiny")
    model.eval()
    before = state(model)
    texts = ["see you", "win a prize now and call", "ok"]
    together = classify(model, texts, tokenizer, CPU)
    alone = [classify(model, [text], tokenizer, CPU)[0] for text in texts]
    assert [a["label"] for a in together] == [a["label"] for a in alone]
    assert [a["probability"] for a in together] == pytest.approx([a["probability"] for a in alone], abs=2e-4)
    assert same_state(model, before)


# Adapters


@pytest.mark.usefixtures("stand_ins", "bf16_processor")
@pytest.mark.parametrize("pad_to", [None, 20])
def test_an_adapter_comes_back_with_its_notes_and_predictions(tokenizer, pad_to):
    model, texts = adapted_classifier(), ["see you", "win a prize now"]
    save_classifier_adapter(model, "adapter", "tiny", EMBEDDED, SETTINGS, pad_to)
    loaded, config, notes = load_classifier_adapter("adapter", CPU)
    assert config["context_length"] == 32
    assert notes["assets"] == EMBEDDED and notes["pad_to"] == pad_to
    assert classify(loaded, texts, tokenizer, CPU, pad_to) == classify(model, texts, tokenizer, CPU, pad_to)


@pytest.mark.usefixtures("stand_ins")
def test_an_adapter_of_version_1_with_one_level_of_settings_is_read():
    model = adapted_classifier()
    settings = asdict(SETTINGS)
    settings |= settings.pop("training")
    notes = {"model_size": "tiny", "assets": asdict(EMBEDDED), "settings": settings}
    save_adapter(model, "adapter", notes)
    loaded, _, notes = load_classifier_adapter("adapter", CPU)
    assert same_state(loaded, state(model))
    assert notes["pad_to"] is None and notes["settings"]["learning_rate"] == 1e-4


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("change", [
    {"model_size": None}, {"model_size": 7}, {"model_size": ["tiny"]},
    {"assets": None}, {"assets": "embedded"}, {"assets": {"model": "embedded"}},
    {"assets": {"model": "embedded", "data": "mine"}}, {"settings": None}, {"settings": {}}, {"settings": []},
    {"settings": {"seed": -1}}, {"settings": {"training": {"seed": "a"}}},
    {"pad_to": "all"}, {"pad_to": 1.5},
], ids=str)
def test_an_adapter_whose_notes_do_not_name_its_training_is_refused(change):
    notes = {"model_size": "tiny", "assets": asdict(EMBEDDED), "settings": asdict(SETTINGS)}
    save_adapter(adapted_classifier(), "adapter", notes | change)
    with pytest.raises(ValueError, match="does not say which GPT-2 it adapts .*use load_adapter"):
        load_classifier_adapter("adapter", CPU)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("notes", [None, {"author": "somebody"}, []])
def test_an_adapter_without_the_notes_is_refused(notes):
    save_adapter(adapted_classifier(), "adapter", notes)
    with pytest.raises(ValueError, match="does not say which GPT-2 it adapts .*use load_adapter"):
        load_classifier_adapter("adapter", CPU)


@pytest.mark.usefixtures("stand_ins")
def test_an_adapter_of_another_model_is_refused_by_what_differs():
    for full, name in (((), "out_head.lora.B is"), (("head",), "out_head.bias is")):
        model, _ = build_classifier("tiny", 7)
        ch06.add_classification_head(model, num_classes=3)
        settings = LoRASettings(rank=2, train_in_full=full).with_training(seed=7)
        save_classifier_adapter(settings.adapt(model), "three", "tiny", EMBEDDED, settings)
        with pytest.raises(ValueError, match=f"{name}.*same head"):
            load_classifier_adapter("three", CPU)


# Training


@pytest.mark.usefixtures("stand_ins", "bf16_processor")
def test_training_messages_of_one_class_are_refused(tokenizer):
    split = pd.DataFrame({"Label": [1, 1], "Text": ["win", "win more"]})
    model, encoded = adapted_classifier(), encode_splits({"train": split}, tokenizer, 8)
    with pytest.raises(ValueError, match="all of one class: both are needed"):
        finetune(model, encoded, SETTINGS.training, CPU)


@pytest.mark.usefixtures("stand_ins", "bf16_processor")
def test_a_model_of_three_classes_is_trained_but_not_given_the_names_of_two(tokenizer):
    split = pd.DataFrame({"Label": [0, 1, 2], "Text": ["see you", "win", "buy"]})
    model, _ = build_classifier("tiny")
    settings = SETTINGS.with_training(epochs=1, progress=False)
    settings.adapt(ch06.add_classification_head(model, num_classes=3))
    encoded = encode_splits({"train": split}, tokenizer, 8)
    finetune(model, encoded, settings.training, CPU)
    assert predict_classes(model, encoded["train"][0], CPU).max() < 3
    with pytest.raises(ValueError, match="3 classes"):
        classify(model, ["win"], tokenizer, CPU)
