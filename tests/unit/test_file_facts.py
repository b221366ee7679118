from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vllm_engine.rank.file_facts import PACKAGE, engine_code


@pytest.mark.parametrize("module", ["__main__.py", "host/gate.py", "rank/relocate.py", "adapter/linear.py"])
def test_a_change_anywhere_in_the_engine_package_is_another_state_of_its_code(tmp_path: Path, module: str) -> None:
    assert str(PACKAGE / module) in [fact[0] for fact in engine_code()]
    package = tmp_path / "vllm_engine"
    shutil.copytree(PACKAGE, package)
    before = engine_code(package)
    assert engine_code(package) == before
    os.utime(package / module)
    after = engine_code(package)
    assert [old[0] for old, new in zip(before, after, strict=True) if old != new] == [str(package / module)]
