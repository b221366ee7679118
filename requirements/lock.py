"""Make a lock: the exact version of every package that `cpu.in` leads to, for one version of Python.

    python requirements/lock.py 3.11 > requirements/cpu-py311.txt

pip alone cannot: some packages declare needs that cannot hold together (a CUDA build of torchvision for the CPU build
of vLLM) and pip has no way to overrule them. So this walks the declared needs itself, breadth first, asks pip for each
newly met package once, and prefers the versions of the lock that exists (`--upgrade` forgets them). It does not
backtrack: a version that somebody's declaration excludes is an error here, unless `cpu.in` overrules it with `~NAME`.
Locks are installed with `pip install --no-deps`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).resolve().parent


@dataclass
class Wanted:
    """What `cpu.in` says."""

    direct: dict[str, Requirement] = field(default_factory=dict)
    never: list[str] = field(default_factory=list)
    overruled: set[str] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Wanted:
        """Parse `path`; raises InvalidRequirement on a line that is none."""
        wanted = cls()
        for line in path.read_text("utf-8").splitlines():
            line = line.partition("#")[0].strip()
            if line.startswith("!"):
                wanted.never.append(canonicalize_name(line[1:]) if "*" not in line else line[1:])
            elif line.startswith("~"):
                wanted.overruled.add(canonicalize_name(line[1:]))
            elif line.startswith("-"):
                wanted.alone.add(canonicalize_name(line[1:]))
            elif line:
                requirement = Requirement(line)
                wanted.direct[canonicalize_name(requirement.name)] = requirement
        return wanted

    def refuses(self, name: str) -> bool:
        """True for packages that no declaration brings in; a direct line always does."""
        return name not in self.direct and any(fnmatch.fnmatch(name, pattern) for pattern in self.never)


@dataclass
class Package:
    """One line of the lock."""

    name: str
    version: Version
    needs: list[Requirement]


def ask_pip(requirements: list[str], python: str, known: dict[str, str]) -> list[Package]:
    """The packages that pip would install for `requirements` alone, without what they need. Raises SystemExit."""
    with tempfile.TemporaryDirectory() as scratch:
        report, constraints = Path(scratch, "report.json"), Path(scratch, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in known.items()), "utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(constraints), "--target", scratch]
        command += ["--python-version", python, "--only-binary", ":all:", *requirements]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(f"pip finds no versions for Python {python} of: {' '.join(requirements)}")
        found = [item["metadata"] for item in json.loads(report.read_text("utf-8"))["install"]]
    return [
        Package(one["name"], Version(one["version"]), [Requirement(line) for line in one.get("requires_dist", [])])
        for one in found
    ]


def resolve(wanted: Wanted, python: str, known: dict[str, str]) -> dict[str, Package]:
    """Every package to install by canonical name. Raises SystemExit naming what cannot hold."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    resolved: dict[str, Package] = {}
    extras: dict[str, set[str]] = {name: set(one.extras) for name, one in wanted.direct.items()}
    declared: dict[str, list[tuple[str, Requirement]]] = {}
    ask = {name: str(requirement) for name, requirement in wanted.direct.items()}
    while ask:
        print(f"asking pip for {len(ask)} packages: {' '.join(sorted(ask))}", file=sys.stderr)
        preferred = {
            name: version
            for name, version in known.items()
            if name in ask and Requirement(ask[name]).specifier.contains(version)
        }
        for package in ask_pip(list(ask.values()), python, preferred):
            name = canonicalize_name(package.name)
            resolved[name] = replace(package, needs=[]) if name in wanted.alone else package
        ask, declared = {}, {}
        for asker, package in resolved.items():
            for need in package.needs:
                name = canonicalize_name(need.name)
                chosen = extras.get(asker, set()) | {""}
                applies = not need.marker or any(
                    need.marker.evaluate({**environment, "extra": extra}) for extra in chosen
                )
                if not applies or wanted.refuses(name):
                    continue
                new_extras = need.extras - extras.setdefault(name, set())
                extras[name] |= need.extras
                declared.setdefault(name, []).append((asker, need))
                if name not in resolved or new_extras:
                    ask[name] = name
        for name in ask:
            specifiers = ",".join({str(need.specifier) for _, need in declared[name]} - {""})
            ask[name] = f"{name}{'' if name in wanted.overruled else specifiers}"
            if name in wanted.direct:
                ask[name] = str(wanted.direct[name])
    broken = [
        f"{name} {resolved[name].version}: {asker} needs {need.specifier}"
        for name, askers in sorted(declared.items())
        for asker, need in askers
        if name not in wanted.overruled and not need.specifier.contains(resolved[name].version, prereleases=True)
    ]
    if broken:
        raise SystemExit("\n".join(["these cannot hold together (overrule with ~NAME in cpu.in):", *broken]))
    return resolved


def main() -> None:
    """Print the lock."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("python", choices=["3.11", "3.12"])
    parser.add_argument("--upgrade", action="store_true", help="forget the versions of the lock that exists")
    arguments = parser.parse_args()
    locks = [HERE / f"cpu-py{arguments.python.replace('.', '')}.txt", HERE / "cpu-py311.txt"]
    known: dict[str, str] = {}
    for lock in locks:
        if lock.exists() and not known and not arguments.upgrade:
            lines = (line.partition("#")[0].strip() for line in lock.read_text("utf-8").splitlines())
            known = {
                canonicalize_name(name): version
                for name, _, version in (line.partition("==") for line in lines if line)
            }
    packages = resolve(Wanted.read(HERE / "cpu.in"), arguments.python, known)
    print(
        f"# Python {arguments.python}, Linux x86-64, no GPU. Made by `make lock` from cpu.in; install with --no-deps."
    )
    if arguments.python != "3.11":
        print("# Untested: it resolves, and nothing more is known.")
    for _, package in sorted(packages.items()):
        print(f"{package.name}=={package.version.public}")


if __name__ == "__main__":
    main()
