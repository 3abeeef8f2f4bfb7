"""Check that the chapters' requirements are installed, and say how to install what is missing.

    python setup/check_environment.py          # exit code 1 if something is missing or too old
"""

import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # a new environment has it only inside pip
    from pip._vendor.packaging.requirements import Requirement

from book_assets.command_line import command

# isort: split
from make_environment import WITHOUT_DEPENDENCIES

REPOSITORY = Path(__file__).resolve().parent.parent
OUR_MODULES = (
    "ch04", "ch05", "gpt_download", "ch06", "appendix_e", "finetune_spam", "lora_in_practice",
    "comparison.costs", "comparison.grid", "comparison.tasks", "topics.inside_lora", "topics.lora_variants",
    "topics.what_lora_buys", "fetch_assets", "book_figures",
)  # and, through these, the other rooms of appendix E and book_assets


def read_requirements(path=REPOSITORY / "requirements.txt"):
    """Yield the requirements in a file, and in the files that it includes, that apply to this platform."""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].split("--hash")[0].strip()
        if line.startswith("-r "):
            yield from read_requirements(path.parent / line[3:].strip())
        elif line and not line.startswith("-"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def check_package(requirement):
    """Return whether the requirement is met, and a line that says so."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return False, f"{requirement.name}: missing, need {requirement.specifier}"
    if not requirement.specifier.contains(found, prereleases=True):
        return False, f"{requirement.name}: {found}, need {requirement.specifier}"
    return True, f"{requirement.name}: {found}"


def check_python():
    """Return whether this version of Python is supported, and a line that says so."""
    right = (3, 10) <= sys.version_info[:2] <= (3, 13)
    need = "" if right else ", need 3.10 to 3.13"
    return right, f"Python: {platform.python_version()}{need}"


def check_our_modules():
    """Return whether the repository's modules can be imported, and a line that says so."""
    try:
        modules = [import_module(name) for name in OUR_MODULES]
    except Exception as error:  # a broken package raises anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        missing = getattr(error, "name", None) in OUR_MODULES
        remedy = 'run "pip install -e ." in its root' if missing else "install that package again"
        return False, f"this repository: {reason}; {remedy}"
    return True, f"this repository: all modules can be imported; device: {modules[0].pick_device()}"


def run_checks():
    """Return the checks as a list of (passed, line)."""
    packages = [*read_requirements(), *read_requirements(WITHOUT_DEPENDENCIES)]
    return [check_python(), *map(check_package, packages), check_our_modules()]


@command
def main(arguments=None):
    print(platform.system(), platform.machine())
    checks = run_checks()
    for right, line in checks:
        print("ok     " if right else "MISSING", line)
    if all(right for right, _ in checks):
        print("Everything is installed.")
        return 0
    print("\nTo install what is missing, run this in the repository's root:")
    print(f'    "{sys.executable}" -m pip install -r requirements.txt')
    without = f"--no-deps --require-hashes -r setup/{WITHOUT_DEPENDENCIES.name}"
    print(f'    "{sys.executable}" -m pip install {without}')
    print("or run python setup/run_tests.py, which creates an environment, .venv, with everything in it.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
