"""What all commands have in common: UTF-8 in and out, one line for an error, no work lost to a closed pipe.

    @command
    def main(arguments=None): …

A script imports this module first: it says which packages are missing before any of them is imported.
"""

import functools
import io
import os
import sys
from importlib.util import find_spec

from book_assets import Choice
from book_assets.downloads import DownloadError

PACKAGES = ("torch", "numpy", "pandas", "matplotlib", "tiktoken", "tqdm", "safetensors")
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, DownloadError)  # their messages explain them

if missing := [name for name in PACKAGES if find_spec(name) is None]:
    raise ModuleNotFoundError(f"missing packages: {', '.join(missing)}")


def command(main):
    """Return `main(arguments=None)` as a command: a user's error ends it with one line and exit code 1.

    Every other exception is a fault of the program and keeps its traceback.
    """

    @functools.wraps(main)
    def run(arguments=None):
        use_utf8()
        try:
            result = main(arguments)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)  # what a shell reports for it
        except (*USER_ERRORS, RuntimeError) as error:
            if not isinstance(error, USER_ERRORS) and "memory" not in str(error):
                raise
            sys.exit(f"error: {explain(error)}")
        if lost := getattr(sys.stdout, "lost", None):
            sys.exit(f"error: not all of the output could be written ({lost.strerror})")
        return result

    return run


def explain(error):
    """Return the message of a user's error; torch's and Python's own say too little about memory."""
    if isinstance(error, (RuntimeError, MemoryError)) and not isinstance(error, DownloadError):
        return "not enough memory: take a smaller rank, batch or model"
    return str(error)


def add_assets_flag(parser):
    """Give the argparse `parser` the flag --assets, a `Choice`; None, its default, means `choose_assets`."""
    parser.add_argument(
        "--assets", type=Choice.parse, metavar="WHICH",
        help="model and data: book (downloaded), embedded (in this repository), or for example "
        "model=embedded,data=book (default: the variable LLM_ASSETS, else book)",
    )


# Standard input and output


class Output(io.TextIOWrapper):
    """Standard output or error, in UTF-8; what cannot be written is dropped, so that the work goes on.

    `lost` is the OSError that came first, unless the reader has merely gone (as `| head` does).
    """

    lost = None

    def write(self, text):
        try:
            return super().write(text)
        except OSError as error:
            return self.drop(error) or len(text)

    def flush(self):
        try:
            super().flush()
        except OSError as error:
            self.drop(error)

    def drop(self, error):
        """Send this output, and what is still in its buffers, to nowhere."""
        if not isinstance(error, BrokenPipeError):
            self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def use_utf8():
    """Read and write UTF-8, whatever the console's encoding is; a closed stream is replaced by an empty one.

    Streams that a test or a notebook has put in place are left alone.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and mode == "r":
            stream.reconfigure(encoding="utf-8-sig")  # Windows' editors and pipes begin with a mark
        elif stream is getattr(sys, f"__{name}__"):
            options = {"encoding": "utf-8", "errors": "backslashreplace", "line_buffering": True}
            setattr(sys, name, Output(stream.buffer, **options))


def read_lines():
    """Return the lines of standard input. Raises ValueError for another encoding than UTF-8."""
    try:
        return sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 ({error.reason}): convert it first") from error
