"""Looks at a model repository on disk."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from swap_agent.models.repository import Repository

CONFIG = """# a comment
name: "a"
backend: "vllm"
instance_group [{ count: 1, kind: KIND_MODEL }]
parameters [
  { key: "KEEP_ALIVE", value: { string_value: "5m" } },
  { key: "PRIORITY" value { string_value: "1" } }
]
parameters: { key: 'PINNED' value: <string_value: 'tr' "ue"> }
"""


def write(root: Path, model: str, text: str = 'backend: "vllm"') -> Path:
    path = root / model / "config.pbtxt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_is_real_protobuf_text(tmp_path: Path) -> None:
    write(tmp_path, "a", CONFIG)
    (tmp_path / "no_model").mkdir()
    (tmp_path / "a_file").touch()
    look = Repository([tmp_path], 0).look()
    assert look.files.keys() == {"a"} and not look.gone
    assert look.files["a"].parameters == {"KEEP_ALIVE": "5m", "PRIORITY": "1", "PINNED": "true"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "names no backend"),
        (CONFIG.encode()[:-30], "is no model configuration (9:"),
        (b'backend: "vllm"\nbudget: 3', 'has no field named "budget"'),
        (b'backend: "vllm"\nname: "b"', "names the model b, but its folder is a"),
        (b"\xff\xfe", "is no model configuration ('utf-8' codec"),
    ],
)
def test_what_cannot_be_read_says_why_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    write(tmp_path, "a").write_bytes(content)
    file = Repository([tmp_path], 0).look().files["a"]
    assert file.parameters is None and words in file.error and "\n" not in file.error


def test_only_what_changed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.parent.name), read_bytes(path))[1])
    paths = {name: write(tmp_path, name) for name in "abc"}
    repository = Repository([tmp_path], 0)
    repository.look()
    assert sorted(read) == ["a", "b", "c"]
    first = repository.look()
    assert len(read) == 3
    os.utime(paths["b"], ns=(1, 1))
    paths["c"].rename(paths["c"].with_name("old"))  # the same bytes, size and time, in another file
    paths["c"].write_bytes(paths["c"].with_name("old").read_bytes())
    os.utime(paths["c"], ns=(0, first.files["c"].mark[0]))  # type: ignore[arg-type]
    read.clear()
    repository.look()
    assert sorted(read) == ["b", "c"]


def test_a_file_is_read_once_nobody_writes_it_any_more(tmp_path: Path) -> None:
    """Every prefix of these lines is a model configuration, and none but the last says what was meant."""
    lines = ['backend: "vllm"\n'] + [f'parameters {{ key: "K{n}" value {{ string_value: "1" }} }}\n' for n in range(30)]
    path = write(tmp_path, "a")
    repository = Repository([tmp_path], 0.1)
    repository.look()

    def slowly() -> None:
        with path.open("w") as file:
            for line in lines:
                file.write(line)
                file.flush()
                time.sleep(0.02)

    writer = threading.Thread(target=slowly)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(len(repository.look().files["a"].parameters or {}))
    assert set(seen) <= {0, 30} and len(seen) >= 3
    assert len(repository.look().files["a"].parameters or {}) == 30


def test_a_file_that_could_not_be_read_is_read_when_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a")
    repository = Repository([tmp_path], 0)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        assert repository.look().files["a"].error == "cannot be read (Permission denied)"
    assert repository.look().files["a"].parameters == {}


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "config.pbtxt")
    assert Repository([tmp_path], 0).look().files["a"].error == "is no file"


def test_a_folder_is_gone_when_two_looks_missed_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    write(tmp_path, "b")
    repository = Repository([tmp_path], 0)
    repository.look()
    away = tmp_path.with_name("away")
    path.parent.rename(away)
    look = repository.look()
    assert look.files["a"].error == "is gone" and not look.gone
    away.rename(path.parent)
    assert repository.look().files["a"].parameters == {}
    path.parent.rename(away)
    repository.look()
    assert repository.look().gone == {"a"}
    away.rename(path.parent)
    look = repository.look()
    assert not look.gone and look.files["a"].parameters == {}


def test_nothing_is_gone_from_a_repository_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, away = tmp_path / "models", tmp_path / "away"
    write(root, "a")
    repository = Repository([root], 0)
    first = repository.look()
    root.rename(away)
    for mount_point in (False, True):
        if mount_point:
            root.mkdir()
        for _ in range(3):
            look = repository.look()
            assert not look.gone and look.files == first.files
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "(No such file or directory)" in said[0] and "(it is empty and another" in said[1]
    root.rmdir()
    away.rename(root)
    assert repository.look().files == first.files


def test_the_first_of_several_repositories_counts(tmp_path: Path) -> None:
    for number, root in enumerate(("one", "two")):
        write(
            tmp_path / root,
            "a",
            f'backend: "vllm" parameters {{ key: "PRIORITY" value {{ string_value: "{number}" }} }}',
        )
    write(tmp_path / "two", "b")
    files = Repository([tmp_path / "one", tmp_path / "two"], 0).look().files
    assert files["a"].parameters == {"PRIORITY": "0"} and files.keys() == {"a", "b"}
