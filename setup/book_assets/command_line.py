"""What all commands have in common: UTF-8 in and out, one line for an error, no work lost to a closed pipe.

    @command
    def main(arguments=None): …

A script of this repository imports this module first: then a missing or broken package, and Ctrl-C while
the packages are imported, also end it with one line. It needs the standard library alone.
"""

import functools
import io
import os
import re
import sys
from pathlib import Path

from book_assets import Choice
from book_assets.table import REPOSITORY

USER_ERRORS = (ValueError, OSError, ImportError, MemoryError)  # their messages say what to do
OUT_OF_MEMORY = re.compile("(out of|not enough|allocate) memory|overflow", re.IGNORECASE)


def command(main):
    """Return `main(arguments=None)` as a command: a user's error ends it with one line and exit code 1.

    Ctrl-C ends it with exit code 130. Any other exception is a fault of the program and keeps its traceback.
    """

    @functools.wraps(main)
    def run(arguments=None):
        use_utf8()
        try:
            result = main(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)  # what a shell reports for it
        except Exception as error:
            if not isinstance(error, USER_ERRORS) and not OUT_OF_MEMORY.search(str(error)):
                raise
            sys.exit(f"error: {explain(error)}")
        if lost := getattr(sys.stdout, "lost", None):
            sys.exit(f"error: not all of the output could be written ({lost.strerror})")
        return result

    return run


def explain(error):
    """Return the message of a user's error; torch's and Python's own say too little about memory."""
    if isinstance(error, MemoryError) or not isinstance(error, USER_ERRORS):
        return "not enough memory: take a smaller rank, batch or model"
    if isinstance(error, ImportError) and error.name:  # from Python, not from us
        return f"{error}: python setup/check_environment.py says what to install"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def end_with_a_line(kind, error, traceback):
    """Report an error that comes before the command has started; meant for sys.excepthook."""
    if not issubclass(kind, (ImportError, OSError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, traceback)
    use_utf8()
    print("interrupted" if kind is KeyboardInterrupt else f"error: {explain(error)}", file=sys.stderr)


script = getattr(sys.modules["__main__"], "__file__", None)
if script and REPOSITORY in Path(script).resolve().parents:  # not in a reader's own program
    sys.excepthook = end_with_a_line


def add_assets_flag(parser, default="book"):
    """Give the argparse `parser` the flag --assets, a `Choice`; None means `choose_assets(default)`."""
    parser.add_argument(
        "--assets", type=Choice.parse, metavar="WHICH",
        help="model and data: book (downloaded), embedded (in this repository), or for example "
        f"model=embedded,data=book (default: the variable LLM_ASSETS, else {default})",
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
            self.lost = self.lost or error
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
            stream.reconfigure(encoding="utf-8-sig", newline=None)  # as Windows' editors and pipes write
        elif stream is getattr(sys, f"__{name}__"):
            options = {"encoding": "utf-8", "errors": "backslashreplace", "line_buffering": True}
            setattr(sys, name, Output(stream.buffer, **options))


def read_lines():
    """Return the lines of standard input. Raises ValueError for another encoding than UTF-8."""
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 ({error.reason}): convert it first") from error
    if "\0" in text:
        raise ValueError("standard input is not UTF-8 text (it has null characters): convert it first")
    return text.removesuffix("\n").split("\n") if text else []
