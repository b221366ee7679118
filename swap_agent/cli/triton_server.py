"""Find a tritonserver and lay out the backend directory that makes it serve our `vllm` backend.

Triton starts a Python-based backend such as ours through its own `python` backend, which has to be the one built with
that server, so a backend directory belongs to one server: `python/` (the server's own) beside `vllm/model.py` (ours).

The *embedded* server comes from the wheel `nvidia-pytriton`, of which only the files are used, never the Python
package. Its libraries find each other by paths relative to themselves, which the assembled tree keeps.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from swap_agent.errors import InvalidUsage

WHEEL = "nvidia-pytriton"
SHIM = "from triton_backend.model import TritonPythonModel  # noqa: D100, F401\n"
"""Content of `vllm/model.py`; the same as `backend/vllm/model.py` of the source tree."""

SHM_BYTES = 16 << 20
"""Memory that tritonserver shares with each stub, for the messages under way. Triton lets the memory grow, but growth
is suspected of unloads that hang (docs/triton-contract.md). Triton's default is 1 MiB.
"""

_STUB = "triton_python_backend_stub"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB_USAGE_EXIT_CODE = 1
"""Exit code of a stub started without arguments, once its libraries were found (python_backend: stub_launcher.cc)."""


@dataclass(frozen=True)
class TritonServer:
    """One tritonserver and the backend directory made for it."""

    binary: Path
    backend_directory: Path
    library_directories: tuple[Path, ...]

    def command(
        self, model_repository: Path, host: str, http_port: int, grpc_port: int, metrics_port: int, shm_prefix: str
    ) -> list[str]:
        """Command line of a server in EXPLICIT mode, with no model loaded.

        `shm_prefix` begins the names of the files in /dev/shm that the server shares with its stubs. Every server of
        a machine needs its own.
        """
        # An HTTP thread of Triton's silently loses responses when it falls some 280 of them behind: Triton does not
        # check whether the socket that wakes the thread is full (seen in 2.51). 32 threads, not 8, fall behind less.
        return [
            str(self.binary),
            "--http-thread-count=32",
            f"--model-repository={model_repository}",
            f"--backend-directory={self.backend_directory}",
            "--model-control-mode=explicit",
            f"--http-address={host}",
            f"--http-port={http_port}",
            f"--grpc-address={host}",
            f"--grpc-port={grpc_port}",
            f"--metrics-address={host}",
            f"--metrics-port={metrics_port}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            f"--backend-config=python,shm-default-byte-size={SHM_BYTES}",
        ]

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with what the server's Python stubs need to find this interpreter, its library and its packages.

        The stub takes its packages from the environment whose `python3` is first on PATH, and ignores PYTHONPATH.
        """
        environment = dict(base)
        environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), base.get("PATH", os.defpath)])
        libraries = [str(directory) for directory in self.library_directories]
        inherited = base.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries + ([inherited] if inherited else []))
        return environment


def find(explicit: Path | None = None) -> TritonServer:
    """The server to use: `explicit` (a flag), else $TRITONSERVER, else the embedded one, else the one on PATH.

    Raises InvalidUsage when there is no server, or when the server cannot work with this interpreter.
    """
    chosen = explicit or (Path(os.environ["TRITONSERVER"]) if os.environ.get("TRITONSERVER") else None)
    if chosen is not None:
        return _foreign(chosen)
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        on_path = shutil.which("tritonserver")
        if on_path is None:
            raise InvalidUsage(
                f"no tritonserver: install the embedded one with `pip install --no-deps {WHEEL}`, "
                "or name yours with --tritonserver or $TRITONSERVER"
            ) from None
        return _foreign(Path(on_path))
    return assemble(Path(str(wheel.locate_file(""))), wheel.version, cache_directory())


def backend_directory(explicit: Path | None = None) -> Path:
    """The directory to give to `tritonserver --backend-directory` for the server that `find` chooses."""
    return find(explicit).backend_directory


def cache_directory() -> Path:
    """Where assembled trees are kept: in this Python environment or, if that is read-only, in the user's cache."""
    prefix = Path(sys.prefix)
    if os.access(prefix, os.W_OK):
        return prefix / "triton-swap"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "triton-swap"


def assemble(site_packages: Path, version: str, cache: Path) -> TritonServer:
    """Lay out the wheel's server under `cache`, named after its version and Python's, unless the tree exists.

    Files are hard links where the file system allows, else copies. Raises InvalidUsage.
    """
    source = site_packages / "pytriton" / "tritonserver"
    stub = source / "python_backend_stubs" / _PYTHON / _STUB
    if not stub.is_file():
        raise InvalidUsage(f"{WHEEL} {version} carries no stub for Python {_PYTHON}: use Python 3.11 or 3.12")

    def populate(tree: Path) -> None:
        server = tree / "pytriton" / "tritonserver"
        (server / "bin").mkdir(parents=True)
        _link(source / "bin" / "tritonserver", server / "bin" / "tritonserver")
        python = server / "backends" / "python"
        python.mkdir(parents=True)
        for file in (source / "backends" / "python").iterdir():
            if file.is_file():  # pip may have left a __pycache__
                _link(file, python / file.name)
        _link(stub, python / _STUB)
        (tree / "nvidia_pytriton.libs").symlink_to(site_packages / "nvidia_pytriton.libs")
        _write_shim(server / "backends")

    tree = _create_once(cache / f"tritonserver-{version}-py{_PYTHON}", populate)
    server = tree / "pytriton" / "tritonserver"
    libraries = (site_packages / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR")))
    found = TritonServer(server / "bin" / "tritonserver", server / "backends", libraries)
    _check_stub(found)
    return found


def _foreign(binary: Path) -> TritonServer:
    """A server of the user's own, with the `python` backend that Triton's packages put beside the server."""
    resolved = shutil.which(str(binary))
    if resolved is None:
        raise InvalidUsage(f"{binary} is no executable tritonserver")
    binary = Path(resolved).resolve()
    python = binary.parent.parent / "backends" / "python"
    stub = python / _STUB
    if not stub.is_file():
        raise InvalidUsage(f"{binary} has no Python backend: {stub} is missing")
    built_for = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    if built_for and built_for[1].decode() != _PYTHON:
        raise InvalidUsage(
            f"the Python backend of {binary} needs Python {built_for[1].decode()}, triton-swap runs in {_PYTHON}: "
            f"install triton-swap into a Python {built_for[1].decode()}"
        )

    def populate(tree: Path) -> None:
        tree.mkdir()
        (tree / "python").symlink_to(python)
        _write_shim(tree)

    key = hashlib.sha256(os.fsencode(binary)).hexdigest()[:12]
    tree = _create_once(cache_directory() / f"backends-{key}", populate)
    return TritonServer(binary, tree, (Path(sysconfig.get_config_var("LIBDIR")),))


def _create_once(tree: Path, populate: Callable[[Path], None]) -> Path:
    """`tree`, made by `populate` in another place and then renamed, so that the tree exists whole or not at all."""
    if tree.exists():
        return tree
    try:
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".new-") as scratch:
            populate(Path(scratch) / "tree")
            try:
                (Path(scratch) / "tree").rename(tree)
            except OSError:
                if not tree.exists():  # else another process was faster, with the same result
                    raise
    except OSError as error:
        raise InvalidUsage(f"cannot lay out tritonserver in {tree}: {error}") from error
    return tree


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _write_shim(backends: Path) -> None:
    (backends / "vllm").mkdir(parents=True)
    (backends / "vllm" / "model.py").write_text(SHIM, encoding="utf-8")


def _check_stub(server: TritonServer) -> None:
    stub = server.backend_directory / "python" / _STUB
    result = subprocess.run(
        [stub], env=server.environment(os.environ), capture_output=True, text=True, check=False, timeout=60
    )
    if result.returncode != _STUB_USAGE_EXIT_CODE:
        raise InvalidUsage(
            f"Triton's Python stub does not start with this interpreter ({sys.executable}): "
            f"{(result.stderr.strip() or f'exit code {result.returncode}').splitlines()[-1]}"
        )
