"""The table of downloads, the choice of assets, replacing a file, the tokenizer, figures."""

import argparse
import hashlib
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from book_assets import AssetsError, Choice, choose_assets, get_tokenizer, in_cache, is_quick
from book_assets.files import OutputError, check_outputs, replacing, write_whole
from book_assets.table import ASSETS, EMBEDDED_MODEL, REPOSITORY
from fetch_assets import fill_tiktoken_cache

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX's file names and devices")
HEX = re.compile(r"[0-9a-f]{64}")


def test_every_source_is_https():
    urls = [url for asset in ASSETS.values() for url in asset.sources]
    assert len(urls) > 60 and all(url.startswith("https://") for url in urls)


def test_every_gpt2_has_its_seven_files_and_the_safetensors_file():
    for size in ("124M", "355M", "774M", "1558M"):
        assert sum(name.startswith(f"gpt2/{size}/") for name in ASSETS) == 8
    assert len(ASSETS) == 4 * 8 + 2 + 4


def test_pins_are_hashes_with_sizes_and_the_small_model_and_the_data_are_pinned():
    for asset in ASSETS.values():
        assert asset.sha256 is None or (HEX.fullmatch(asset.sha256) and asset.size)
        assert asset.licence and asset.filename == asset.filename.strip("/")
    loose = {name.split("/")[1] for name, asset in ASSETS.items() if asset.sha256 is None}
    assert loose == {"355M", "774M", "1558M"}
    assert HEX.fullmatch(ASSETS["sms-spam"].member.sha256)


def test_nothing_that_is_downloaded_is_a_pickle():
    assert not any(asset.filename.endswith((".bin", ".pt", ".pth", ".pkl")) for asset in ASSETS.values())


def test_the_embedded_vocabulary_is_the_pinned_one():
    for file in ("vocab.bpe", "encoder.json"):
        content = (EMBEDDED_MODEL / file).read_bytes()
        asset = ASSETS[f"gpt2-bpe/{file}"]
        assert (len(content), hashlib.sha256(content).hexdigest()) == (asset.size, asset.sha256)


def test_the_pins_are_those_of_the_real_files(book_data):
    for name, file in (
        ("the-verdict", "the-verdict.txt"), ("gpt2-bpe/vocab.bpe", "gpt2_bpe/vocab.bpe"),
        ("instructions", "instruction-data.json"),
    ):
        content = (book_data / file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (ASSETS[name].size, ASSETS[name].sha256)
    content = (book_data / "sms_spam_collection" / "SMSSpamCollection").read_bytes()
    member = ASSETS["sms-spam"].member
    assert (len(content), hashlib.sha256(content).hexdigest()) == (member.size, member.sha256)


# The choice of assets


@pytest.mark.parametrize(
    "text, choice",
    [
        ("book", Choice("book", "book")),
        ("embedded", Choice("embedded", "embedded")),
        ("model=embedded,data=book", Choice("embedded", "book")),
        ("data=book,model=embedded", Choice("embedded", "book")),
        (" data=embedded , model = book ", Choice("book", "embedded")),
    ],
)
def test_the_choice_is_the_variable_or_the_argument(text, choice, monkeypatch):
    assert Choice.parse(text) == choice
    monkeypatch.delenv("LLM_ASSETS", raising=False)
    assert choose_assets(text) == choice
    monkeypatch.setenv("LLM_ASSETS", text)
    assert choose_assets("book") == choose_assets("embedded") == choice


def test_an_empty_variable_leaves_the_default(monkeypatch):
    monkeypatch.setenv("LLM_ASSETS", "")
    assert choose_assets() == Choice("book", "book")


@pytest.mark.parametrize(
    "text",
    [
        "Book", "bo ok", "tiny", "model=embedded", "model=book,model=book", "model=book,data=mine",
        "model=em bedded,data=book", "a=b,c=d", ",",
    ],
)
def test_another_choice_is_an_error_that_names_the_choices(text, monkeypatch):
    monkeypatch.setenv("LLM_ASSETS", text)
    with pytest.raises(ValueError, match=r"LLM_ASSETS.*book.*embedded.*model=WORD.data=WORD"):
        choose_assets()


def test_argparse_prints_the_error_of_another_choice_unchanged(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Choice.parse)
    with pytest.raises(AssetsError) as error:
        Choice.parse("tiny")
    with pytest.raises(SystemExit):
        parser.parse_args(["--assets", "tiny"])
    assert f"argument --assets: {error.value}\n" in capsys.readouterr().err


def test_the_embedded_model_has_one_size():
    assert Choice.parse("embedded").model_size() == Choice.parse("embedded").model_size("tiny") == "tiny"
    with pytest.raises(AssetsError, match="one size, tiny: choose model=book for 355M"):
        Choice.parse("embedded").model_size("355M")
    assert Choice.parse("data=embedded,model=book").model_size("355M") == "355M"
    assert Choice.parse("book").model_size() == "124M"


def test_a_choice_says_which_model_and_which_data():
    text = str(Choice("embedded", "book"))
    assert "model=embedded: gpt2-tiny" in text and "data=book: the book's texts" in text


@pytest.mark.parametrize(
    "value, quick", [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)]
)
def test_notebook_quick(value, quick, monkeypatch):
    monkeypatch.delenv("NOTEBOOK_QUICK", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTEBOOK_QUICK", value)
    assert is_quick() is quick


def test_the_cache_takes_relative_paths_once(tmp_path, monkeypatch):
    monkeypatch.delenv("LLM_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert in_cache("gpt2") == in_cache(in_cache("gpt2")) == REPOSITORY / "downloads" / "gpt2"
    assert in_cache(tmp_path / "gpt2") == tmp_path / "gpt2"
    monkeypatch.setenv("LLM_CACHE_DIR", "cache")
    assert in_cache("gpt2") == in_cache(in_cache("gpt2")) == tmp_path / "cache" / "gpt2"
    assert in_cache(tmp_path / "gpt2") == tmp_path / "gpt2"


def test_a_home_folder_that_does_not_exist_is_an_ordinary_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_CACHE_DIR", "~nobody-of-this-name/cache")
    assert in_cache("gpt2") == tmp_path / "~nobody-of-this-name" / "cache" / "gpt2"


# Replacing a file, checking that it can be written


def test_a_file_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "weights.pt"
    for content in ("old", "new"):
        with replacing(target) as partial:
            partial.write_text(content, encoding="utf-8")
            assert not target.exists() or target.read_text(encoding="utf-8") == "old"
        assert target.read_text(encoding="utf-8") == content
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(error, tmp_path):
    target = tmp_path / "weights.pt"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(error), replacing(str(target)) as partial:
        partial.write_text("half", encoding="utf-8")
        raise error
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


@POSIX
@pytest.mark.parametrize("name", ["x" * 255, "🎁" * 60])
def test_the_longest_name_can_be_replaced(name, tmp_path):
    check_outputs(tmp_path / name)
    write_whole(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("place, reason", [
    ("folder", "a folder or device is there"), ("", "a folder or device is there"),
    ("file/below", "exists|Not a directory"), ("a\0b", "null"),
    pytest.param("x" * 300, "too long", marks=POSIX),
])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(place, reason, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=rf"cannot be written \(.*({reason}).*\): choose another place"):
        check_outputs(tmp_path / "good", tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@POSIX
def test_a_device_is_not_replaced_by_a_file():
    with pytest.raises(OutputError, match="a folder or device is there"):
        check_outputs(os.devnull)


def test_a_write_protected_file_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_outputs(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a user who is not root
    with pytest.raises(OutputError, match="write-protected"):
        check_outputs(tmp_path / "file")


def test_a_check_leaves_the_file_and_makes_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    check_outputs(tmp_path / "file", tmp_path / "new" / "folder" / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert list((tmp_path / "new" / "folder").iterdir()) == []


# The tokenizer


@pytest.fixture(scope="module")
def tiktokens_own(tmp_path_factory):
    """tiktoken's own GPT-2 encoding, from its cache as `fill_tiktoken_cache` leaves it."""
    import tiktoken
    from tiktoken_ext.openai_public import gpt2

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        fill_tiktoken_cache()
        return tiktoken.Encoding(**gpt2())


def test_the_tokenizer_gives_the_books_ids(tokenizer):
    assert tokenizer.name == "gpt2" and tokenizer.n_vocab == 50257 and tokenizer.eot_token == 50256
    assert tokenizer.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert tokenizer.encode("Every day holds a") == [6109, 1110, 6622, 257]
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.encode("<|endoftext|>", allowed_special={"<|endoftext|>"}) == [50256]


def test_the_tokenizer_has_tiktokens_vocabulary(tokenizer, tiktokens_own):
    assert tokenizer.token_byte_values() == tiktokens_own.token_byte_values()
    for token in (0, 255, 256, 50255):
        assert tokenizer.decode_single_token_bytes(token) == tiktokens_own.decode_single_token_bytes(token)


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=" \n\t'sdmtlvre19aZü£中")))
def test_the_tokenizer_encodes_as_tiktoken_does(tokenizer, tiktokens_own, text):
    assert tokenizer.encode_ordinary(text) == tiktokens_own.encode_ordinary(text)


def test_the_tokenizer_encodes_the_real_texts_as_tiktoken_does(tokenizer, tiktokens_own, book_data):
    for file, count in (("the-verdict.txt", 5145), ("sms_spam_collection/SMSSpamCollection", None)):
        text = (book_data / file).read_text(encoding="utf-8")
        ids = tokenizer.encode(text)
        assert ids == tiktokens_own.encode(text)
        assert count in (None, len(ids))


@pytest.mark.parametrize("ids", [
    '{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}', '{"ab": 256}', "{}", "[1]", "null",
    '{"ab": 256, "<|endoftext|>": 257, "▁the": 258}', '{"a": 0, "b": 0, "<|endoftext|>": 1}',
    '{"a": "0", "<|endoftext|>": 1}',
])
def test_files_that_do_not_belong_together_or_are_not_gpt2s_are_an_error(ids, tmp_path):
    (tmp_path / "encoder.json").write_text(ids, encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="do not belong together: fetch both again"):
        get_tokenizer(tmp_path)


# The time that importing takes


def test_importing_the_table_is_cheap():
    heavy = "{'numpy', 'torch', 'pandas', 'tiktoken', 'requests', 'matplotlib', 'IPython'}"
    code = f"import sys, book_assets; print({heavy} & sys.modules.keys())"
    folder = REPOSITORY / "setup"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=folder) == "set()\n"
