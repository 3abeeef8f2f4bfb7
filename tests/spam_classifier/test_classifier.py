"""Messages to token ids, predictions, adapters whose notes name their base model."""

import io
from dataclasses import asdict

import numpy as np
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
    load_classifier_adapter,
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
    with pytest.raises(ValueError, match="message 1 is empty"):
        encode_messages(["you", ""], tokenizer, 3)


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
def test_an_adapter_that_names_no_gpt2_is_refused():
    save_adapter(adapted_classifier(), "adapter", {"author": "somebody"})
    with pytest.raises(ValueError, match="does not say which GPT-2 it adapts"):
        load_classifier_adapter("adapter", CPU)
