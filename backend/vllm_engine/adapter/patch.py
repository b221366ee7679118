"""Replacing a name of vLLM's, and putting it back."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from swap_agent.errors import Unsupported


class Patch:
    """`owner.name` is `replacement` from `install` to `uninstall`, or in a `with` block. `hooks.HOOKS` has the name."""

    def __init__(self, owner: Any, name: str, replacement: Any) -> None:
        self._owner = owner
        self._name = name
        self._replacement = replacement
        self.original: Any = None
        """vLLM's own, once it is replaced."""

    def install(self) -> None:
        """Replace the name; nothing happens when it is replaced already.

        Raises Unsupported when the name is gone, or is not vLLM's own but another's function.
        """
        where = f"{getattr(self._owner, '__name__', self._owner)}.{self._name}"
        if not hasattr(self._owner, self._name):
            raise Unsupported(f"this vLLM has no {where}: use a supported version")
        found = getattr(self._owner, self._name)
        if found is self._replacement:
            return
        module = getattr(found, "__module__", "vllm") or "vllm"
        if callable(found) and module.partition(".")[0] != "vllm":
            raise Unsupported(f"{where} is not vLLM's own but of {module}, which replaced it: remove what does that")
        self.original = found
        setattr(self._owner, self._name, self._replacement)

    def uninstall(self) -> None:
        """Put vLLM's own back; nothing happens when it is there. Raises Unsupported when another has replaced ours."""
        if self.original is None:
            return
        if getattr(self._owner, self._name) is not self._replacement:
            raise Unsupported(f"{self._name} of vLLM was replaced by another while it was ours: remove what does that")
        setattr(self._owner, self._name, self.original)
        self.original = None

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.uninstall()
