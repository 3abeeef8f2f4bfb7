"""Say what this Python has of what the chapters need, and how to get what is missing.

    python setup/check_environment.py          # exit code 1 if anything is missing or too old
"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # a bare Python has it inside pip
    from pip._vendor.packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
CHAPTER_MODULES = ("ch04", "ch05", "gpt_download", "ch06", "appendix_e")


def requirements(path=REPOSITORY / "requirements.txt"):
    """Yield the requirements of a file, and of the files it includes, that apply to this platform."""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from requirements(path.parent / line[3:].strip())
        elif line and not line.startswith("-"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def check_package(requirement):
    """Return (is it right, a line that says so)."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return False, f"{requirement.name}: missing, need {requirement.specifier}"
    if not requirement.specifier.contains(found, prereleases=True):
        return False, f"{requirement.name}: {found}, need {requirement.specifier}"
    return True, f"{requirement.name}: {found}"


def check_python():
    right = (3, 10) <= sys.version_info[:2] <= (3, 13)
    need = "" if right else ", need 3.10 to 3.13"
    return right, f"Python: {platform.python_version()}{need}"


def check_chapters():
    """Return whether the chapters' modules are on the import path, and a line that says so."""
    missing = [name for name in CHAPTER_MODULES if (spec := find_spec(name)) is None or not spec.origin]
    if missing:
        return False, f"chapters: cannot import {', '.join(missing)}; run \"pip install -e .\" here"
    return True, f"chapters: {', '.join(CHAPTER_MODULES)} can be imported"


def all_checks():
    """Return the checks as a list of (is it right, line), Python and platform first."""
    checks = [check_python(), *map(check_package, requirements()), check_chapters()]
    if checks[-1][0] and find_spec("torch"):
        from ch04 import pick_device

        checks.append((True, f"device: {pick_device()}"))
    return checks


def main():
    print(platform.system(), platform.machine())
    checks = all_checks()
    for right, line in checks:
        print("ok     " if right else "MISSING", line)
    if all(right for right, _ in checks):
        print("Everything is there.")
        return 0
    print("\nTo get what is missing, in the repository's root:")
    print(f'    "{sys.executable}" -m pip install -r requirements.txt')
    print("or let python setup/run_tests.py make an environment of its own, .venv, with everything in it.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
