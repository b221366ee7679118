from __future__ import annotations

from types import ModuleType

import pytest

from swap_agent.errors import Unsupported
from vllm_engine.adapter.patch import Patch


def function(module: str) -> object:
    def made() -> None: ...

    made.__module__ = module
    return made


@pytest.fixture
def module() -> ModuleType:
    found = ModuleType("vllm.part")
    found.name, found.interval = function("vllm.part"), 5  # type: ignore[attr-defined]
    return found


def test_a_name_is_replaced_in_the_block_only(module: ModuleType) -> None:
    before, ours = module.name, function("vllm_engine.part")
    with Patch(module, "name", ours) as patch:
        assert module.name is ours and patch.original is before
    assert module.name is before
    with pytest.raises(ZeroDivisionError), Patch(module, "name", ours):
        raise ZeroDivisionError
    assert module.name is before


def test_installing_twice_is_installing_once(module: ModuleType) -> None:
    patch = Patch(module, "interval", 1)
    patch.install()
    patch.install()
    assert (module.interval, patch.original) == (1, 5)
    patch.uninstall()
    patch.uninstall()
    assert module.interval == 5


def test_a_name_that_is_gone_or_not_vllms_own_is_refused(module: ModuleType) -> None:
    with pytest.raises(Unsupported, match=r"this vLLM has no vllm\.part\.other"):
        Patch(module, "other", 1).install()
    module.name = function("plugin.part")  # type: ignore[attr-defined]
    with pytest.raises(Unsupported, match=r"vllm\.part\.name is not vLLM's own but of plugin\.part"):
        Patch(module, "name", function("vllm_engine.part")).install()


def test_what_replaced_ours_meanwhile_is_not_put_away(module: ModuleType) -> None:
    patch = Patch(module, "name", function("vllm_engine.part"))
    patch.install()
    module.name = other = function("plugin.part")  # type: ignore[attr-defined]
    with pytest.raises(Unsupported, match="replaced by another while it was ours"):
        patch.uninstall()
    assert module.name is other
