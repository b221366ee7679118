"""Check that every relative link in the repository's Markdown leads to a file. Exit code 1 names those that do not."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def main() -> int:
    """Print how many links were followed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    followed, broken = 0, []
    for name in listed.stdout.splitlines():
        for target in LINK.findall((ROOT / name).read_text("utf-8")):
            if "://" in target or target.startswith("mailto:"):
                continue
            followed += 1
            if not (ROOT / name).parent.joinpath(target).exists():
                broken.append(f"{name}: {target} does not exist")
    print("\n".join([*broken, f"{followed} links followed, {len(broken)} broken"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
