"""Chapter 6: fine-tuning a GPT to tell spam from other text messages.

`ch06.ipynb` explains the same definitions one by one; those of earlier chapters are imported.
Shapes in comments: B batch, T tokens, C classes. Accuracies are fractions between 0 and 1.
"""

from itertools import islice

import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

import ch05
from book_assets import in_cache
from book_assets.downloads import fetch_spam_data
from book_assets.table import EMBEDDED_MESSAGES
from gpt_checkpoint import check_max_length, load_classifier, save_classifier  # noqa: F401 (section 6.8)

LABELS = {"ham": 0, "spam": 1}
SPLITS = ("train", "validation", "test")

# 6.2 Preparing the data


def download_and_unzip_spam_data(url, zip_path, extracted_path, data_file_path):
    """Download the SMS Spam Collection to `data_file_path` and verify it, unless a good file is there.

    Only `url` is tried; None tries the known sources in turn. The archive is stored at `zip_path` and
    unpacked in `extracted_path`. Raises `book_assets.downloads.DownloadError`. Source: listing E.1.
    """
    fetch_spam_data(url, zip_path, extracted_path, data_file_path)


def read_messages(path, labels=LABELS):
    """Return a DataFrame with the columns Label (one of `labels`) and Text from a tab-separated file.

    Quotes are read as in listing E.1, by pandas' default: in the SMS Spam Collection a quotation mark
    that is not closed swallows the lines up to the next one, so 5,574 lines give 5,572 messages.
    Raises ValueError for other labels.
    """
    df = pd.read_csv(
        path, sep="\t", header=None, names=["Label", "Text"],
        keep_default_na=False,  # "NA" and "null" are messages like any other
    )
    remedy = f"every line of {path} must be a label, a tab and a message"
    check_labels(df["Label"], labels, remedy)
    return df


def load_messages(choice):
    """Return `read_messages` of `choice.data`: "book" (UCI's, downloaded if missing) or "embedded"."""
    if choice.data == "embedded":
        return read_messages(EMBEDDED_MESSAGES)
    folder = in_cache("sms_spam_collection")
    path = folder / "SMSSpamCollection.tsv"
    download_and_unzip_spam_data(None, f"{folder}.zip", folder, path)
    return read_messages(path)


def balanced_messages(choice):
    """Return a DataFrame with Label (0 ham, 1 spam) and Text: as many ham as spam of `load_messages`."""
    messages = create_balanced_dataset(load_messages(choice))
    return messages.assign(Label=messages["Label"].map(LABELS))


def spam_splits(choice):
    """Return {"train", "validation", "test": DataFrame}: `balanced_messages`, split as in the book."""
    return dict(zip(SPLITS, random_split(balanced_messages(choice), 0.7, 0.1), strict=True))


def check_labels(labels, known, remedy):
    """Raise ValueError, naming the first unknown labels, unless every label is one of `known`."""
    unknown = labels[~labels.isin(list(known))].unique().tolist()
    if unknown:
        raise ValueError(f"labels {unknown[:3]} are not among {list(known)}: {remedy}")


def create_balanced_dataset(df, labels=LABELS):
    """Return equally many rows of each of `labels`, in their order, sampled with random_state 123.

    Only the smallest class, unless it is the first, is not sampled and so keeps its rows' order. Raises
    ValueError for other labels, or if a class has no rows. Source: section 6.2.
    """
    remedy = "balance before mapping to numbers, or name your labels with labels="
    check_labels(df["Label"], labels, remedy)
    first, *others = (df[df["Label"] == label] for label in labels)
    size = min(map(len, (first, *others)))
    if size == 0:
        raise ValueError(f"a class of {list(labels)} has no rows: each needs some")
    first = first.sample(size, random_state=123)
    others = [g.sample(size, random_state=123) if len(g) > size else g for g in others]
    return pd.concat([first, *others])


def random_split(df, train_frac, validation_frac):
    """Shuffle (random_state 123) and cut into training, validation and test rows: three DataFrames.

    The test rows are the rest. Raises ValueError if a fraction is negative or their sum exceeds 1.
    Source: section 6.2.
    """
    fractions = (train_frac, validation_frac)
    if not (min(fractions) >= 0 and sum(fractions) <= 1):
        raise ValueError(
            f"fractions {fractions} must not be negative, nor exceed 1 together: "
            "what they leave is the test part"
        )
    df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(df) * train_frac)
    validation_end = train_end + int(len(df) * validation_frac)
    return df[:train_end], df[train_end:validation_end], df[validation_end:]


# 6.3 Data loaders


def encode_message(text, tokenizer):
    """Return the token ids of one message, as a list; ValueError if it has no text.

    The name of a special token, such as <|endoftext|>, is read as plain text.
    """
    if not text.strip():
        raise ValueError("no text: leave out messages without text")
    return tokenizer.encode(text, disallowed_special=())


def cut_or_pad(token_ids, length, pad_token_id=50256):
    """Return exactly `length` ids: the first ones, or all of them followed by `pad_token_id`."""
    return token_ids[:length] + [pad_token_id] * (length - len(token_ids))


class SpamDataset(Dataset):
    """Messages of a CSV file with the columns Label (0, 1 …) and Text, as equally long token ids.

    `csv_file` is a path or an open file. Messages are padded to `max_length` tokens or cut to the first
    ones; None takes the longest message's length. It must not exceed the model's context length.
    Item: (ids (max_length,), label ()), both int64. Raises ValueError for missing columns, labels that
    are not numbers, messages without text (by row, from 0), no messages, and max_length below 1.
    Source: section 6.3, listing E.2.
    """

    def __init__(self, csv_file, tokenizer, max_length=None, pad_token_id=50256):
        check_max_length(max_length)
        self.data = read_labelled_csv(csv_file)
        encoded = [encode_message(t, tokenizer) for t in self.data["Text"]]
        self.max_length = max_length or max(map(len, encoded))
        self.input_ids = torch.tensor([
            cut_or_pad(ids, self.max_length, pad_token_id) for ids in encoded
        ])
        self.labels = torch.tensor(self.data["Label"].tolist())

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.input_ids[index], self.labels[index]


def read_labelled_csv(csv_file):
    """Return the DataFrame (Label 0, 1 …, Text not empty) of a CSV file; ValueError for anything else."""
    try:
        df = pd.read_csv(csv_file, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own, and UnicodeDecodeError
        problem = f"{csv_file} is empty or no CSV file in UTF-8 ({str(error).strip()})"
        raise ValueError(f"{problem}: write the split with to_csv") from error
    if not {"Label", "Text"} <= set(df.columns):
        raise ValueError(
            f"{csv_file} must have the columns Label and Text, "
            f"its first line is {list(df.columns)}"
        )
    words = df.loc[~df["Label"].str.fullmatch("[0-9]{1,4}"), "Label"].unique().tolist()
    if words:
        raise ValueError(
            f"labels {words[:3]} are not class numbers 0, 1 …: "
            'map words to numbers first, with .map({"ham": 0, "spam": 1})'
        )
    empty = df.index[df["Text"].str.strip() == ""].tolist()
    if empty or df.empty:
        problem = f"no text in rows {empty[:3]}" if empty else "no messages"
        raise ValueError(f"{csv_file} has {problem}: correct and rewrite it")
    return df.assign(Label=df["Label"].astype(int))


# 6.5 A classification head


def add_classification_head(model, num_classes=2):
    """Replace `model.out_head` in place with a new linear layer (D to num_classes); return `model`."""
    if num_classes < 2:
        raise ValueError(f"num_classes {num_classes}: there must be at least 2")
    weight = model.tok_emb.weight
    model.out_head = nn.Linear(weight.shape[1], num_classes).to(weight)
    return model


def unfreeze_last_block(model):
    """Freeze `model` in place except for the last block, final norm and output head; return it."""
    model.requires_grad_(False)
    for part in (model.trf_blocks[-1], model.final_norm, model.out_head):
        part.requires_grad_(True)
    return model


# 6.6 Loss and accuracy


def class_logits(input_batch, target_batch, model, device):
    """Return the last token's logits (B, C), inputs (B, T); ValueError for targets (B,) not in 0 … C − 1."""
    logits = model(input_batch.to(device))[:, -1, :]  # (B, C)
    if target_batch.min() < 0 or target_batch.max() >= logits.shape[1]:
        raise ValueError(
            f"labels {target_batch.tolist()}, but the head has {logits.shape[1]} "
            "classes: use add_classification_head with num_classes"
        )
    return logits


def predicted_classes(logits):
    """Return the index of the largest of each row's logits (B, C), (B,); ValueError for NaN."""
    if logits.isnan().any():
        raise ValueError("the model answers NaN: train again at a lower learning rate")
    return logits.argmax(dim=-1)


def calc_accuracy_loader(data_loader, model, device, num_batches=None):
    """Return the fraction of correct predictions in the first `num_batches` batches (None: all).

    NaN for no batches. The predicted class has the largest logit at the last token. Leaves `model` in
    eval mode. Source: section 6.6.
    """
    model.eval()
    correct, examples = 0, 0
    for input_batch, target_batch in islice(data_loader, num_batches):
        with torch.no_grad():
            logits = class_logits(input_batch, target_batch, model, device)
        hits = predicted_classes(logits) == target_batch.to(device)
        correct += hits.sum().item()
        examples += len(target_batch)
    return correct / examples if examples else float("nan")


def calc_loss_batch(input_batch, target_batch, model, device):
    """Return the last token's mean cross-entropy, inputs (B, T), targets (B,): a tensor with a gradient."""
    logits = class_logits(input_batch, target_batch, model, device)
    return nn.functional.cross_entropy(logits, target_batch.to(device))


def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Return the mean loss of the first `num_batches` batches (None: all); NaN for no batches."""
    return ch05.calc_loss_loader(
        data_loader, model, device, num_batches, calc_loss_batch
    )


def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """Return the mean training and validation loss of `eval_iter` batches each, without dropout."""
    return ch05.evaluate_model(
        model, train_loader, val_loader, device, eval_iter, calc_loss_batch
    )


# 6.7 Fine-tuning


def train_classifier_simple(
    model, train_loader, val_loader, optimizer, device, num_epochs,
    eval_freq, eval_iter, tokenizer=None, progress=True,
):
    """Train the classifier; print losses every `eval_freq` steps and accuracies after each epoch.

    Both are measured on `eval_iter` batches. `tokenizer` is accepted for listing E.7 and not used.
    `progress=False` (or the variable TQDM_DISABLE=1) hides the bar. Returns (train_losses, val_losses,
    train_accs, val_accs, examples_seen), the last one a number. Raises ValueError as
    `ch05.train_model_simple` does. Source: section 6.7.
    """
    ch05.check_training(train_loader, val_loader, eval_freq, eval_iter)
    train_losses, val_losses, train_accs, val_accs = [], [], [], []
    examples_seen, global_step = 0, -1
    for epoch in range(num_epochs):
        model.train()  # the evaluations below switch to eval mode
        batches = ch05.with_progress(train_loader, f"epoch {epoch + 1}", progress)
        for input_batch, target_batch in batches:
            optimizer.zero_grad()  # forget the last batch's gradients
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            ch05.check_divergence([loss], steps=global_step + 1)
            loss.backward()  # the gradients of the weights that are not frozen
            optimizer.step()  # a small step that lowers this batch's loss
            examples_seen += len(input_batch)
            global_step += 1
            if global_step % eval_freq == 0:  # look at both losses now and then
                train_loss, val_loss = evaluate_model(
                    model, train_loader, val_loader, device, eval_iter
                )
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                tqdm.write(
                    f"Ep {epoch + 1} (Step {global_step:06d}): "
                    f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}"
                )
        ch05.check_divergence(model.parameters(), steps=global_step + 1)
        train_acc, val_acc = (
            calc_accuracy_loader(loader, model, device, eval_iter)
            for loader in (train_loader, val_loader)
        )
        train_accs.append(train_acc)
        val_accs.append(val_acc)
        tqdm.write(
            f"Training accuracy: {train_acc:.2%} | Validation accuracy: {val_acc:.2%}"
        )
    return train_losses, val_losses, train_accs, val_accs, examples_seen


def plot_values(
    epochs_seen, examples_seen, train_values, val_values, label="loss", save_as=None
):
    """Return a Figure of both curves over epochs (below) and examples (above): see `ch05.plot_curves`."""
    curves = {f"training {label}": train_values, f"validation {label}": val_values}
    return ch05.plot_curves(
        epochs_seen, examples_seen, "examples", curves, label, save_as
    )


# 6.8 Using the classifier


def classify_review(
    text, model, tokenizer, device, max_length=None, pad_token_id=50256,
    classes=("not spam", "spam"),
):
    """Return the likeliest of `classes` for one text, read at the last position as in training.

    The text is padded or cut to `max_length` (the training's) but never exceeds the model's context; None,
    for a classifier trained without padding, reads its last token. Raises ValueError for an empty text and
    for a head of another number of classes. Source: section 6.8.
    """
    check_max_length(max_length)
    model.eval()
    context_length = model.pos_emb.weight.shape[0]
    input_ids = encode_message(text, tokenizer)
    length = min(max_length or len(input_ids), context_length)
    input_ids = cut_or_pad(input_ids, length, pad_token_id)
    with torch.no_grad():
        logits = model(torch.tensor([input_ids], device=device))[:, -1]  # (1, C)
    if logits.shape[1] != len(classes):
        raise ValueError(
            f"the head has {logits.shape[1]} classes, not {len(classes)}: "
            "name them with classes="
        )
    return classes[predicted_classes(logits).item()]
