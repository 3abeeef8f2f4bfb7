"""List what the book's code downloads, or download it in advance.

    python setup/fetch_assets.py list                       # every file: present or missing, and its size
    python setup/fetch_assets.py fetch gpt2/124M sms-spam   # before you go offline; --all for everything
    python setup/fetch_assets.py tiktoken                   # tiktoken.get_encoding("gpt2") without a network
"""

import argparse
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from book_assets import in_cache
from book_assets.command_line import command  # first: it explains an import that fails
from book_assets.downloads import DownloadError, fetch
from book_assets.files import check_outputs, replacing
from book_assets.table import ASSETS, EMBEDDED_MODEL, VOCABULARY


def fill_tiktoken_cache():
    """Copy the embedded vocabulary into tiktoken's cache, so that it does not download it; return the folder.

    By tiktoken's rules that is TIKTOKEN_CACHE_DIR, else DATA_GYM_CACHE_DIR, else a folder in the system's
    temporary one, and a file's name is the SHA-1 of its URL. Raises ValueError if the cache is turned off
    or cannot be written.
    """
    chosen = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if chosen == "":
        raise ValueError("an empty TIKTOKEN_CACHE_DIR turns tiktoken's cache off: unset it or name a folder")
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / "data-gym-cache"
    for file in VOCABULARY:
        target = folder / hashlib.sha1(ASSETS[f"gpt2-bpe/{file}"].sources[0].encode()).hexdigest()
        check_outputs(target)
        with replacing(target) as partial:
            shutil.copyfile(EMBEDDED_MODEL / file, partial)
    return folder


def format_size(size):
    """Return a number of bytes as text such as 497.8 MB, or a question mark for None."""
    if size is None:
        return "?"
    if size < 1000:
        return f"{size} B"
    unit = "kB" if size < 1e6 else "MB" if size < 1e9 else "GB"
    return f"{size / {'kB': 1e3, 'MB': 1e6, 'GB': 1e9}[unit]:.1f} {unit}"


def find_assets(names):
    """Return the assets with these names or in these groups, such as gpt2/124M. Raises ValueError."""
    found = []
    for name in names:
        matches = [a for a in ASSETS.values() if a.name == name or a.name.startswith(f"{name}/")]
        if not matches:
            groups = sorted({re.sub(r"/[^/]*$", "", asset) for asset in ASSETS})
            raise ValueError(f"no asset {name!r}: use a name from `list`, or {', '.join(groups)}")
        found += matches
    return [*dict.fromkeys(found)]


def list_assets(base):
    """Print one line per asset: whether it is in the folder `base`, its size, whether its hash is pinned."""
    for asset in ASSETS.values():
        path = base / asset.folder / asset.filename
        state = "there" if path.exists() else "missing"
        size = path.stat().st_size if path.exists() else asset.size
        pin = "pinned" if asset.sha256 else "unpinned"
        print(f"{state:8} {format_size(size):>9}  {pin:9} {asset.name:42} {asset.licence}")


def fetch_assets(assets, base):
    """Fetch all assets, the rest also when one fails; then raise DownloadError with the reports."""
    failures = []
    for asset in assets:
        try:
            path = fetch(asset, base / asset.folder)
            print(f"{asset.name}: {path} ({format_size(path.stat().st_size)})")
        except DownloadError as error:
            failures.append(str(error))
    if failures:
        raise DownloadError("\n\n".join(failures))


def list_command(folder):
    """List every file: present or missing, its size, whether its hash is pinned, its licence."""
    print(f"folder {folder.absolute()}")
    list_assets(folder.absolute())


def fetch_command(folder, names, everything):
    """Download files in advance."""
    if bool(names) == everything:
        raise ValueError("give either the names of assets or --all")
    assets = list(ASSETS.values()) if everything else find_assets(names)
    base = folder.absolute()
    print(f"folder {base}")
    if base.absolute() != in_cache("."):
        print(f"Notebooks look in {in_cache('.')}; for this folder, set LLM_CACHE_DIR={base}")
    fetch_assets(assets, base)


def tiktoken_command():
    """Copy GPT-2's vocabulary into tiktoken's cache, so that it needs no network."""
    print(f"tiktoken finds GPT-2's vocabulary in {fill_tiktoken_cache()}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, function in (("list", list_command), ("fetch", fetch_command), ("tiktoken", tiktoken_command)):
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(command=function)
    for name in ("list", "fetch"):
        commands.choices[name].add_argument(
            "--folder", type=Path, default=in_cache("."), help="default: LLM_CACHE_DIR, else downloads"
        )
    sub = commands.choices["fetch"]
    sub.add_argument("names", nargs="*", help="assets, or groups of them, such as gpt2/124M")
    sub.add_argument("--all", action="store_true", dest="everything", help="the whole table (about 23 GB)")
    return parser


@command
def main(arguments=None):
    """Run one command, see --help."""
    options = vars(make_parser().parse_args(arguments))
    options.pop("command")(**options)


if __name__ == "__main__":
    main()
