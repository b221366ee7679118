from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from swap_agent.cli import supervisor, triton_server
from swap_agent.errors import InvalidUsage

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Site-packages with the files of the wheel that count."""
    source = tmp_path / "site-packages" / "pytriton" / "tritonserver"
    program(source / "bin" / "tritonserver", "exit 0")
    program(source / "backends" / "python" / "libtriton_python.so", "")
    program(source / "backends" / "python" / "triton_python_backend_utils.py", "")
    program(source / "python_backend_stubs" / PYTHON / "triton_python_backend_stub", "exit 1")
    (tmp_path / "site-packages" / "nvidia_pytriton.libs").mkdir()
    return tmp_path / "site-packages"


def test_the_shim_is_the_one_of_the_source_tree() -> None:
    source = Path(__file__).parents[2] / "backend" / "vllm" / "model.py"
    assert source.read_text(encoding="utf-8") == triton_server.SHIM


def test_assembling_twice_makes_one_tree(wheel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    server = triton_server.assemble(wheel, "1.0", cache)
    made = server.binary.stat()
    assert triton_server.assemble(wheel, "1.0", cache) == server
    assert server.binary.stat() == made
    assert [entry.name for entry in cache.iterdir()] == [f"tritonserver-1.0-py{PYTHON}"]
    assert sorted(entry.name for entry in (server.backend_directory / "python").iterdir()) == [
        "libtriton_python.so",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    ]
    assert (server.backend_directory / "vllm" / "model.py").read_text(encoding="utf-8") == triton_server.SHIM
    libraries = server.binary.parents[3] / "nvidia_pytriton.libs"  # where the binary's RPATH looks
    assert libraries.resolve() == wheel / "nvidia_pytriton.libs"


def test_a_failed_assembly_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    (wheel / "pytriton" / "tritonserver" / "bin" / "tritonserver").unlink()
    with pytest.raises(InvalidUsage, match="cannot lay out tritonserver"):
        triton_server.assemble(wheel, "1.0", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_stub_that_does_not_start_is_reported_in_its_own_words(wheel: Path, tmp_path: Path) -> None:
    stub = wheel / "pytriton" / "tritonserver" / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    program(stub, "echo libpython3.so: cannot open shared object file >&2; exit 127")
    with pytest.raises(InvalidUsage, match=r"does not start.*libpython3.so: cannot open"):
        triton_server.assemble(wheel, "1.0", tmp_path / "cache")


def test_a_server_of_ones_own_keeps_its_python_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server, "cache_directory", lambda: tmp_path / "cache")
    binary = program(tmp_path / "opt" / "bin" / "tritonserver", "exit 0")
    with pytest.raises(InvalidUsage, match="has no Python backend"):
        triton_server.find(binary)
    stub = program(tmp_path / "opt" / "backends" / "python" / "triton_python_backend_stub", f"# libpython{PYTHON}.so")
    server = triton_server.find(binary)
    assert server.binary == binary
    assert (server.backend_directory / "python").resolve() == stub.parent
    assert (server.backend_directory / "vllm" / "model.py").is_file()
    program(stub, "# libpython3.8.so")
    with pytest.raises(InvalidUsage, match=r"needs Python 3\.8"):
        triton_server.find(binary)


def test_a_named_server_goes_before_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidUsage, match="nowhere is no executable tritonserver"):
        triton_server.find()
    with pytest.raises(InvalidUsage, match="flag is no executable tritonserver"):
        triton_server.find(tmp_path / "flag")


def test_the_stub_finds_this_environment_first(wheel: Path, tmp_path: Path) -> None:
    server = triton_server.assemble(wheel, "1.0", tmp_path / "cache")
    environment = server.environment({"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/mine", "HOME": "/h"})
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.prefix) / "bin"), "/usr/bin"]
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[-1] == "/mine"
    assert environment["HOME"] == "/h"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: TritonModelException: model 'm': "
            "no\n agent\n\nAt:\n  /b/triton_backend/model.py(49): initialize\n\n;",
            "model 'm': no agent",
        ),
        (
            "failed to load 'm', failed to poll from model repository",
            "failed to load 'm', failed to poll from model repository",
        ),
    ],
)
def test_tritons_error_becomes_our_line(error: str, line: str) -> None:
    assert supervisor.load_failure(error) == line
