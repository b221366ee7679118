"""What ranks of starting engines have asked the policy for, and wait for: frames and host memory."""

from __future__ import annotations

import concurrent.futures

from swap_agent.errors import Unavailable

Answer = concurrent.futures.Future[None]
"""A rank's thread waits for it. Refused: Unavailable."""


class StartRequests:
    """Every method belongs to the loop's thread."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, int], Answer] = {}
        self._host_memory: dict[str, list[Answer]] = {}

    def wait_for_frames(self, replica: str, rank: int, answer: Answer) -> None:
        """This rank waits for the frames of one region."""
        self._frames[replica, rank] = answer

    def wait_for_host_memory(self, replica: str, answer: Answer) -> None:
        """One rank more of this replica waits for host memory."""
        self._host_memory.setdefault(replica, []).append(answer)

    def answer_frames(self, replica: str, rank: int, refusal: str = "") -> None:
        """What this rank asked for is granted, or refused with a reason."""
        _answer(self._frames.pop((replica, rank)), refusal)

    def answer_host_memory(self, replica: str, refusal: str = "") -> None:
        """What the ranks of this replica asked for up to now is granted, or refused with a reason."""
        for asked in self._host_memory.pop(replica):
            _answer(asked, refusal)

    def engine_ended(self, replica: str, reason: str) -> None:
        """Every request of the engine is refused with the reason of its end."""
        for key in [key for key in self._frames if key[0] == replica]:
            self.answer_frames(*key, reason)
        if replica in self._host_memory:
            self.answer_host_memory(replica, reason)


def _answer(asked: Answer, refusal: str) -> None:
    if refusal:
        asked.set_exception(Unavailable(refusal))
    else:
        asked.set_result(None)
