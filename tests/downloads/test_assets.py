"""The table of downloads, the switch, the tokenizer without a network, and the command."""

import hashlib
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import book_assets
from book_assets import Choice, choose_assets, downloads, get_tokenizer, in_cache, is_quick
from book_assets.table import ASSETS, EMBEDDED_MODEL, Asset

HEX = re.compile(r"[0-9a-f]{64}")


def test_every_source_is_https():
    urls = [url for asset in ASSETS.values() for url in asset.sources]
    assert len(urls) > 60 and all(url.startswith("https://") for url in urls)


def test_every_gpt2_has_its_seven_files_and_the_safetensors_file():
    for size in ("124M", "355M", "774M", "1558M"):
        assert sum(name.startswith(f"gpt2/{size}/") for name in ASSETS) == 8
    assert len(ASSETS) == 4 * 8 + 2 + 2


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
    for name, file in (("the-verdict", "the-verdict.txt"), ("gpt2-bpe/vocab.bpe", "gpt2_bpe/vocab.bpe")):
        content = (book_data / file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (ASSETS[name].size, ASSETS[name].sha256)
    content = (book_data / "sms_spam_collection" / "SMSSpamCollection").read_bytes()
    member = ASSETS["sms-spam"].member
    assert (len(content), hashlib.sha256(content).hexdigest()) == (member.size, member.sha256)


# The switch


@pytest.mark.parametrize(
    "text, choice",
    [
        ("book", Choice("book", "book")),
        ("embedded", Choice("embedded", "embedded")),
        ("model=embedded,data=book", Choice("embedded", "book")),
        (" data=embedded , model=book ", Choice("book", "embedded")),
    ],
)
def test_the_switch_is_the_variable_or_the_argument(text, choice, monkeypatch):
    monkeypatch.delenv("LLM_ASSETS", raising=False)
    assert choose_assets(text) == choice
    monkeypatch.setenv("LLM_ASSETS", text)
    assert choose_assets("book") == choose_assets("embedded") == choice


def test_an_empty_variable_leaves_the_default(monkeypatch):
    monkeypatch.setenv("LLM_ASSETS", "")
    assert choose_assets() == Choice("book", "book")


@pytest.mark.parametrize(
    "text",
    ["Book", "tiny", "model=embedded", "model=book,model=book", "model=book,data=mine", "a=b,c=d", ","],
)
def test_another_choice_is_an_error_that_names_the_choices(text, monkeypatch):
    monkeypatch.setenv("LLM_ASSETS", text)
    with pytest.raises(ValueError, match=r"book.*embedded.*model=….data=….*LLM_ASSETS"):
        choose_assets()


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
    assert str(in_cache("gpt2")) == "gpt2"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_CACHE_DIR", "cache")
    assert in_cache("gpt2") == in_cache(in_cache("gpt2")) == tmp_path / "cache" / "gpt2"
    assert in_cache(tmp_path / "gpt2") == tmp_path / "gpt2"


# The tokenizer


@pytest.fixture(scope="module")
def tiktokens_own(tmp_path_factory):
    """tiktoken's own GPT-2 encoding, from its cache as `fill_tiktoken_cache` leaves it."""
    import tiktoken
    from tiktoken_ext.openai_public import gpt2

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        book_assets.fill_tiktoken_cache()
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


def test_files_that_do_not_belong_together_are_an_error(tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0, "b": 1, "ab": 2}', encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="do not belong together: fetch both again"):
        get_tokenizer(tmp_path)


def test_tiktokens_cache_follows_its_own_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "gym"))
    assert book_assets.fill_tiktoken_cache() == tmp_path / "gym"
    assert sorted(path.name for path in (tmp_path / "gym").iterdir()) == [
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    ]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(ValueError, match="turns tiktoken's cache off"):
        book_assets.fill_tiktoken_cache()


# Figures, the command, the cost of importing


def test_a_figure_is_shown_with_its_alternative_text_and_closed(monkeypatch):
    import matplotlib.pyplot as plt
    from IPython import display

    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    book_assets.show(plt.figure(), "a rising line")
    (image,) = shown
    assert image.data.startswith(b"\x89PNG") and image.alt == "a rising line"
    assert plt.get_fignums() == []


@pytest.fixture
def table(monkeypatch):
    own = [Asset(f"gpt2/{name}", name, ("https://x.invalid",), 1500, None, "MIT") for name in ("a", "b")]
    monkeypatch.setattr(book_assets, "ASSETS", {asset.name: asset for asset in own})


def test_list_says_what_is_there_and_how_large(table, tmp_path, capsys):
    (tmp_path / "a").write_bytes(bytes(70))
    book_assets.main(["list", "--folder", str(tmp_path)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"folder {tmp_path}"
    assert [line.split()[:5] for line in lines] == [
        ["there", "70", "B", "unpinned", "gpt2/a"], ["missing", "1.5", "kB", "unpinned", "gpt2/b"],
    ]


@pytest.mark.parametrize(
    "arguments, names",
    [(["gpt2/a"], ["gpt2/a"]), (["gpt2"], ["gpt2/a", "gpt2/b"]), (["--all"], ["gpt2/a", "gpt2/b"])],
)
def test_fetch_takes_names_folders_or_all(arguments, names, table, tmp_path, monkeypatch):
    fetched = []

    def fetch(asset, folder):
        fetched.append(asset.name)
        (folder / asset.filename).write_bytes(b"")
        return folder / asset.filename

    monkeypatch.setattr(downloads, "fetch", fetch)
    book_assets.main(["fetch", *arguments, "--folder", str(tmp_path)])
    assert fetched == names


def test_fetch_fetches_the_rest_when_one_fails_and_ends_with_the_report(table, tmp_path, monkeypatch):
    fetched = []

    def fetch(asset, folder):
        fetched.append(asset.name)
        raise downloads.DownloadError(f"{asset.name} is gone")

    monkeypatch.setattr(downloads, "fetch", fetch)
    with pytest.raises(SystemExit, match=r"(?s)gpt2/a is gone.*gpt2/b is gone"):
        book_assets.main(["fetch", "--all", "--folder", str(tmp_path)])
    assert fetched == ["gpt2/a", "gpt2/b"]


@pytest.mark.parametrize("arguments", [["fetch"], ["fetch", "gpt3"]])
def test_fetch_without_a_known_name_says_what_there_is(arguments, table, capsys):
    with pytest.raises(SystemExit):
        book_assets.main(arguments)
    assert re.search(r"--all|no asset 'gpt3': name one that `list` shows, or gpt2", capsys.readouterr().err)


def test_importing_the_table_is_cheap():
    heavy = "{'numpy', 'torch', 'pandas', 'tiktoken', 'requests', 'matplotlib', 'IPython'}"
    code = f"import sys, book_assets; print({heavy} & sys.modules.keys())"
    folder = book_assets.REPOSITORY / "setup"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=folder) == "set()\n"
