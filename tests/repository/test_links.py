"""Every link in the pages and notebooks leads somewhere: to a file of the repository, to a heading in it.

Addresses on the web are not fetched. They must be well-formed, and Colab's must name a notebook of ours.
"""

import json
import posixpath
import re
import subprocess
from functools import cache
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import pytest

from book_assets.table import REPOSITORY

if not (REPOSITORY / ".git").exists():
    pytest.skip("needs a git repository: it lists the files", allow_module_level=True)

FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1[`~]* *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
INLINE = re.compile(r"\]\(\s*<?((?:[^()\s<>]|\([^()\s]*\))*)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s+\".*\")?\s*$", re.MULTILINE)
HTML = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=[\"']([^\"']*)[\"']")
BARE = re.compile(r"<((?:https?|mailto):[^>]*)>")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)(?:\s+#+)?\s*$", re.MULTILINE)
SCRIPT = re.compile(r"\bpython3? (?:\.\./)?([\w./-]+\.py)")
HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}")
OWN_FILE = re.compile(r"/(?:github/)?[^/]+/[^/]+/(?:blob|tree|raw)/main/(.+)")


def find_links(text):
    """Return the targets of all links and pictures in the Markdown `text`; code is none."""
    text = CODE.sub("", FENCE.sub("", text))
    return [link for pattern in (INLINE, REFERENCE, HTML, BARE) for link in pattern.findall(text)]


def find_headings(text):
    """Return the headings in the Markdown `text` as they are read: without marks of code, emphasis, links."""
    headings = HEADING.findall(FENCE.sub("", text))
    headings = [re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return [re.sub(r"[`*]|\\(?=\W)", "", heading) for heading in headings]


def github_anchors(headings):
    """Return the anchors that GitHub makes for a page's headings: a second "Files" becomes files-1."""
    anchors = {}
    for heading in headings:
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = anchors[slug] = anchors.get(slug, -1) + 1
        if number:
            anchors.setdefault(f"{slug}-{number}", 0)
    return {*anchors}


def jupyter_anchors(headings):
    """Return the anchors of a notebook's headings, in Jupyter as on GitHub: blanks become hyphens."""
    return {heading.replace(" ", "-") for heading in headings}


@cache
def read_markdown(name):
    """Return the text of a page, or of a notebook's Markdown cells."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    if not name.endswith(".ipynb"):
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def anchors_of(name):
    headings = find_headings(read_markdown(name))
    return jupyter_anchors(headings) if name.endswith(".ipynb") else github_anchors(headings)


def list_files():
    """Return the repository's files: those that git has, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return {name for name in listing.split("\0") if name and (REPOSITORY / name).exists()}


FILES = list_files()
PATHS = FILES | {str(parent) for name in FILES for parent in PurePosixPath(name).parents}
PAGES = sorted(name for name in FILES if name.endswith((".md", ".ipynb")))


def fault_of(link, page):
    """Return what is wrong with `link` on `page` (a path in the repository), or None."""
    scheme, host, path, query, anchor = urlsplit(link)
    if scheme or host:
        return fault_of_address(scheme, host, path, link)
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(path))) if path else page
    if query or path.startswith("/") or target not in PATHS:
        return f"no file or folder {target}"
    if not anchor:
        return None if path else "empty"
    if not target.endswith((".md", ".ipynb")):
        return f"{target} has no headings"
    return None if unquote(anchor) in anchors_of(target) else f"no heading #{anchor} in {target}"


def fault_of_address(scheme, host, path, link):
    """Return what is wrong with an address on the web, or None; nothing is fetched."""
    if scheme == "mailto":
        return None
    if scheme != "https" or not HOST.fullmatch(host) or re.search(r"[\s\\\"|^]", link):
        return "not a well-formed https address"
    own = host == "colab.research.google.com" and OWN_FILE.fullmatch(path)
    return f"no file {own[1]}" if own and unquote(own[1]) not in FILES else None


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    faults = {link: fault_of(link, page) for link in find_links(read_markdown(page))}
    assert not {link: fault for link, fault in faults.items() if fault}


def test_links_are_found():
    assert len(PAGES) > 15
    assert sum(len(find_links(read_markdown(page))) for page in PAGES) > 100


def test_every_command_names_a_script_of_the_repository():
    scripts = {name for page in PAGES for name in SCRIPT.findall(read_markdown(page))}
    assert len(scripts) > 8
    assert scripts - FILES == set()


@pytest.mark.parametrize("link, page, fault", [
    ("ch04/ch04.py", "README.md", None),
    ("ch04", "README.md", None),
    ("../setup/README.md#your-machine", "ch04/README.md", None),
    ("#your-machine", "setup/README.md", None),
    ("ch04/ch04.ipynb#4.2-Layer-normalisation", "README.md", None),
    ("https://arxiv.org/abs/2106.09685", "README.md", None),
    ("https://colab.research.google.com/github/o/r/blob/main/ch04/ch04.ipynb", "README.md", None),
    ("ch04/ch4.py", "README.md", "no file or folder ch04/ch4.py"),
    ("Ch04/ch04.py", "README.md", "no file or folder Ch04/ch04.py"),
    ("ch04.py", "README.md", "no file or folder ch04.py"),
    ("../../elsewhere.md", "ch04/README.md", "no file or folder ../elsewhere.md"),
    ("/README.md", "README.md", "no file or folder /README.md"),
    (".git/config", "README.md", "no file or folder .git/config"),
    ("setup/README.md#Your-machine", "README.md", "no heading #Your-machine in setup/README.md"),
    ("ch04/ch04.ipynb#42-layer-normalisation", "README.md",
     "no heading #42-layer-normalisation in ch04/ch04.ipynb"),
    ("ch04/ch04.py#L3", "README.md", "ch04/ch04.py has no headings"),
    ("", "README.md", "empty"),
    ("http://arxiv.org/abs/2106.09685", "README.md", "not a well-formed https address"),
    ("https:/arxiv.org/abs/2106.09685", "README.md", "not a well-formed https address"),
    ("https://arxiv/abs", "README.md", "not a well-formed https address"),
    ("https://colab.research.google.com/github/o/r/blob/main/ch04/x.ipynb", "README.md",
     "no file ch04/x.ipynb"),
])
def test_a_broken_link_is_told_from_a_good_one(link, page, fault):
    assert fault_of(link, page) == fault


@pytest.mark.parametrize("text, links", [
    ("a [link](one.md) and [`code`](two.md#three)", ["one.md", "two.md#three"]),
    ("[![badge](picture.svg)](target)", ["picture.svg", "target"]),
    ('[titled](one.md "A title"), [round](f_(x).md), [angle](<one.md>)', ["one.md", "f_(x).md", "one.md"]),
    ("[text][1]\n\n[1]: one.md", ["one.md"]),
    ('<img src="one.svg" alt="x"> <a class="y" href=\'two\'>z</a>', ["one.svg", "two"]),
    ("<https://a.example>", ["https://a.example"]),
    ("`[code](one.md)`, ``a ` [code](two.md)``\n\n```\n[code](three.md)\n```\n[link](four.md)", ["four.md"]),
])
def test_all_kinds_of_links_are_found_and_code_is_none(text, links):
    assert find_links(text) == links


def test_anchors_are_those_of_github_and_of_jupyter():
    text = "# A `b_c`: *d*, [e](f)!\n## Files\n## Files\n```\n# no heading\n```\n### 4.1 √hd – why?"
    headings = find_headings(text)
    assert headings == ["A b_c: d, e!", "Files", "Files", "4.1 √hd – why?"]
    assert github_anchors(headings) == {"a-b_c-d-e", "files", "files-1", "41-hd--why"}
    assert jupyter_anchors(headings) == {"A-b_c:-d,-e!", "Files", "4.1-√hd-–-why?"}
