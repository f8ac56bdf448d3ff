"""The Python packages that `make` installs, in the versions of tools/constraints.txt.

    python tools/packages.py list EXTRA...      requirements of these extras and of the build
    python tools/packages.py raise              resolve anew, write tools/constraints.txt

`raise` takes the newest versions that pyproject.toml's ranges and pip's own constraints allow, for
every Python from 3.10 on and for each release of torch in TORCHES. uv does the resolving, as pip
resolves for the running interpreter alone; it is installed into build/resolve, not into .venv.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
RESOLVE = ROOT / "build" / "resolve"  # uv, and what goes in and out of it
TORCHES = ("2.11.0", "2.12.0", "2.13.0", "2.14.1")
# uv reads it in its working directory. Without it, releases for other systems, processors and
# interpreters, and for Pythons that have no wheels yet, would have to go together too.
PYTHONS = "python_full_version < '3.15'"
SYSTEM = (
    "sys_platform == 'linux' and platform_machine == 'x86_64' and "
    f"platform_python_implementation == 'CPython' and {PYTHONS}"
)
SETTINGS = f"""\
[project]
name = "pins"
version = "0"

[tool.uv]
environments = ["{SYSTEM}"]
"""
BUILD_TOOLS = ("cmake>=3.22", "ninja")  # installed where the system has none

# A release of torch asks for its own triton and CUDA libraries, and torchvision for one of torch.
OF_TORCH = re.compile(r"torch|torchvision|triton|cuda-.*|nvidia-.*")
OTHER_SYSTEMS = re.compile(r"== '(win32|emscripten|darwin)'")
ANY_ON_LINUX = re.compile(r"\bor sys_platform != '(win32|emscripten|darwin)'")
HEAD = """\
# The versions that `make` installs. `make constraints` writes this file, from the ranges in
# pyproject.toml, and runs the tests with it. A line with a marker is for those releases of Python.
# torch is not here, as TORCH chooses it, nor are triton and the CUDA libraries, as torch asks for
# its own. A release of torchvision asks for one release of torch; tools/setup.sh takes its line:
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(extras: list[str]) -> list[str]:
    """Of the build and of these extras, in the words of pyproject.toml."""
    content = project()
    known = content["project"]["optional-dependencies"]
    for name in extras:
        if name not in known:
            known_names = ", ".join(known)
            sys.exit(f'packages.py: expected EXTRA to be one of {known_names}, got "{name}"')
    listed = content["build-system"]["requires"] + content["project"]["dependencies"]
    listed = listed + [requirement for name in extras for requirement in known[name]]
    return list(dict.fromkeys(listed))


def pip_constraints() -> list[str]:
    """Files that pip.conf or PIP_CONSTRAINT name: what holds for pip here has to hold for uv."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    values = re.findall(r"^\S*\.constraint='(.*)'$", listed, re.MULTILINE)
    return [path for value in values for path in value.split()]


def on_linux(line: str) -> str | None:
    """A line of uv's output with what is left of its marker there: the Python release."""
    pin, _, marker = line.partition(" ; ")
    if OTHER_SYSTEMS.search(marker):
        return None
    if ANY_ON_LINUX.search(marker):
        return pin
    clauses = [clause for clause in marker.split(" and ") if re.search(r"\bpython_", clause)]
    clauses = [clause for clause in clauses if clause != PYTHONS]
    return f"{pin} ; {' and '.join(clauses)}" if clauses else pin


def resolve(torch: str, *, held: list[str]) -> list[str]:
    """name==version lines, with markers for the Python release, for one release of torch.

    `held` are such lines that the result has to keep to.
    """
    given, limits = RESOLVE / "requirements.in", RESOLVE / "limits.txt"
    everything = requirements(list(project()["project"]["optional-dependencies"]))
    given.write_text("\n".join([*everything, *BUILD_TOOLS]) + "\n")
    limits.write_text("\n".join([f"torch=={torch}", *held]) + "\n")
    command = [str(RESOLVE / "bin" / "uv"), "pip", "compile", "--quiet", "--universal"]
    command += ["--python-version", "3.10", "--no-annotate", "--no-header"]
    for path in (str(limits), *pip_constraints()):
        command += ["--constraint", path]
    (RESOLVE / "pyproject.toml").write_text(SETTINGS)
    done = subprocess.run([*command, str(given)], capture_output=True, text=True, cwd=RESOLVE)
    if done.returncode:
        sys.exit(f"packages.py: no versions go with torch {torch}:\n{done.stderr}")
    lines = [on_linux(line) for line in done.stdout.splitlines()]
    return [line for line in lines if line is not None]


def of_torch(line: str) -> bool:
    return OF_TORCH.fullmatch(line.partition("==")[0]) is not None


def raise_versions() -> None:
    if not (RESOLVE / "bin" / "uv").is_file():
        subprocess.check_call([sys.executable, "-m", "venv", RESOLVE])
    subprocess.check_call([RESOLVE / "bin" / "pip", "install", "-q", "--upgrade", "uv"])
    pins: list[str] = []
    visions = []
    for torch in TORCHES:  # the oldest first: only it still has upper bounds
        print(f"packages.py: resolving for torch {torch}", flush=True)
        lines = resolve(torch, held=pins)
        visions += [f"#torch {torch}: {line}" for line in lines if line.startswith("torchvision==")]
        common = [line for line in lines if not of_torch(line)]
        if pins and common != pins:
            differing = ", ".join(sorted(set(common) ^ set(pins)))
            sys.exit(f"packages.py: torch {torch} and {TORCHES[0]} differ in {differing}")
        pins = common
    CONSTRAINTS.write_text(HEAD + "\n".join([*visions, "", *pins]) + "\n")
    print(f"packages.py: wrote {CONSTRAINTS.relative_to(ROOT)}, {len(pins)} lines")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["list"]:
        print(*requirements(arguments[1:]), sep="\n")
    elif arguments == ["raise"]:
        raise_versions()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
