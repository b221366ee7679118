"""Check what the repository's Markdown names: exit code 1 lists what is not there.

1. A relative link leads to a file.
2. A path in backticks that begins with a folder of ours is there. A CamelCase name, a flag or an UPPER_CASE setting in
   backticks occurs in the code. Not in docs/adr, docs/benchmarks and CHANGELOG.md, which tell of their day.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
BASES = [ROOT, ROOT / "backend", ROOT / "swap_agent"]
FOLDERS = ["swap_agent", "backend", "triton_backend", "vllm_engine", "loadtest", "tests", "requirements", "docs", ".ci"]
FOLDERS += ["policy", "daemon", "device", "models", "wire", "plan", "simulate", "cli"]
PATH = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*\w/?")
NAME = re.compile(r"[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]*)+|[A-Z]+_[A-Z_]+|--[a-z][a-z-]+")
HISTORY = ("docs/adr/", "docs/benchmarks/", "CHANGELOG.md")


def main() -> int:
    """Print how many links, paths and names were followed."""
    pages, sources = _listed("*.md"), _listed("*.py", "*.c", "*.sh", "*.toml", "*.in", "requirements/*.txt")
    words = set(re.findall(r"\w+|--[a-z-]+", " ".join((ROOT / name).read_text("utf-8") for name in sources)))
    followed, broken = 0, []
    for page in pages:
        text = (ROOT / page).read_text("utf-8")
        for target in LINK.findall(text):
            if "://" not in target and not target.startswith("mailto:"):
                followed += 1
                if not (ROOT / page).parent.joinpath(target).exists():
                    broken.append(f"{page}: {target} does not exist")
        for code in [] if page.startswith(HISTORY) else CODE.findall(text):
            if PATH.fullmatch(code):
                followed += 1
                if not any((base / code).exists() for base in BASES):
                    broken.append(f"{page}: `{code}` does not exist")
            elif NAME.fullmatch(code):
                followed += 1
                if code not in words:
                    broken.append(f"{page}: `{code}` is no name in the code")
    print("\n".join([*broken, f"{followed} links, paths and names followed, {len(broken)} broken"]))
    return 1 if broken else 0


def _listed(*patterns: str) -> list[str]:
    """Files that git knows or would take."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


if __name__ == "__main__":
    sys.exit(main())
