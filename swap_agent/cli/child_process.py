"""One process that `serve` starts, watches and stops."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from swap_agent.errors import Unavailable
from swap_agent.linux import end_with_parent


class Child:
    """A running process, in a session of its own so that Ctrl-C in the terminal does not reach it.

    The output goes to a new file `log`. The kernel ends the process with SIGTERM if this one dies.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def exit_report(self, lines: int) -> str:
        """How the process ended, with the last lines of its log."""
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.name} died ({how}); the end of {self._log}:\n{self._tail(lines)}"

    def wait_until_answering(self, ask: Callable[[], httpx.Response], timeout_s: float) -> None:
        """Return when `ask` gets an answer of success. Raises Unavailable if the process ends first or takes longer."""
        give_up_s = time.monotonic() + timeout_s
        while time.monotonic() < give_up_s:
            if not self.alive:
                raise Unavailable(f"{self.name} did not start: {self._tail(1) or f'see {self._log}'}")
            with contextlib.suppress(httpx.HTTPError):
                if ask().is_success:
                    return
            time.sleep(0.05)
        raise Unavailable(f"{self.name} did not answer within {timeout_s:.0f} s, see {self._log}")

    def wait(self, timeout_s: float) -> bool:
        """Whether the process ended within that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return not self.alive

    def stop(self, timeout_s: float) -> None:
        """End the process by SIGTERM, after `timeout_s` by SIGKILL, and return when it has ended.

        An exception while this waits kills the process.
        """
        if not self.alive:
            return
        self._process.terminate()
        try:
            self.wait(timeout_s)
        finally:
            self._process.kill()  # does nothing to a process that has ended
            self._process.wait()

    def _tail(self, lines: int) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
