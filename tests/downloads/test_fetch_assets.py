"""The command that lists and downloads assets, and fills tiktoken's cache."""

import pytest

import fetch_assets
from book_assets.downloads import DownloadError
from book_assets.table import Asset


@pytest.fixture
def table(monkeypatch):
    own = [Asset(f"gpt2/{name}", name, ("https://x.invalid",), 1500, None, "MIT") for name in ("a", "b")]
    monkeypatch.setattr(fetch_assets, "ASSETS", {asset.name: asset for asset in own})


def test_list_says_what_is_there_and_how_large(table, tmp_path, capsys):
    (tmp_path / "a").write_bytes(bytes(70))
    fetch_assets.main(["list", "--folder", str(tmp_path)])
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

    monkeypatch.setattr(fetch_assets, "fetch", fetch)
    fetch_assets.main(["fetch", *arguments, "--folder", str(tmp_path)])
    assert fetched == names


def test_fetch_fetches_the_rest_when_one_fails_and_ends_with_the_report(table, tmp_path, monkeypatch):
    fetched = []

    def fetch(asset, folder):
        fetched.append(asset.name)
        raise DownloadError(f"{asset.name} is gone")

    monkeypatch.setattr(fetch_assets, "fetch", fetch)
    with pytest.raises(SystemExit, match=r"(?s)gpt2/a is gone.*gpt2/b is gone"):
        fetch_assets.main(["fetch", "--all", "--folder", str(tmp_path)])
    assert fetched == ["gpt2/a", "gpt2/b"]


@pytest.mark.parametrize("arguments", [["fetch"], ["fetch", "gpt2/a", "--all"], ["fetch", "gpt3"]])
def test_fetch_takes_either_known_names_or_all(arguments, table):
    says = "either the names of assets or --all|no asset 'gpt3': use a name from `list`, or gpt2"
    with pytest.raises(SystemExit, match=says):
        fetch_assets.main(arguments)


@pytest.mark.parametrize("arguments", [
    ["list", "gpt2"], ["list", "--all"], ["tiktoken", "gpt2"], ["tiktoken", "--folder", "x"], ["x"], [],
])
def test_an_option_that_would_do_nothing_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        fetch_assets.main(arguments)
    assert error.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err or len(arguments) < 2


def test_an_asset_that_is_named_twice_is_fetched_once(table):
    assert [asset.name for asset in fetch_assets.find_assets(["gpt2/b", "gpt2", "gpt2/b"])] == [
        "gpt2/b", "gpt2/a",
    ]


@pytest.mark.parametrize("place", ["a file", "a file/below", "n" * 300])
def test_a_cache_of_tiktoken_that_cannot_be_written_is_reported_in_one_line(place, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / place))
    with pytest.raises(SystemExit, match="^error: .* cannot be written .*: choose another place$"):
        fetch_assets.main(["tiktoken"])


def test_tiktokens_cache_follows_its_own_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "gym"))
    assert fetch_assets.fill_tiktoken_cache() == tmp_path / "gym"
    assert sorted(path.name for path in (tmp_path / "gym").iterdir()) == [
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    ]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(ValueError, match="turns tiktoken's cache off"):
        fetch_assets.fill_tiktoken_cache()
