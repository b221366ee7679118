"""Progress of work in steps: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """A context manager around work of `total` steps; call it with what the next step does."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title = title
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._progress.add_task(title, total=total, visible=console.is_terminal)
        self._begun = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __call__(self, what: str) -> None:
        """The next step begins, so the one before is done."""
        self._progress.update(self._task, completed=self._begun, description=f"{self._title}: {what}")
        self._begun += 1
        if not self._console.is_terminal:
            self._console.print(f"  {self._title} {self._begun}: {what}", soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
