from __future__ import annotations

import asyncio

import pytest

from swap_agent.errors import TritonSwapError, Unavailable
from vllm_engine.host.gate import Gate


class Watched(Gate):
    """A gate that records its counts at every change."""

    def __init__(self, max_queue: int = 8, queue_timeout_s: float = 60.0) -> None:
        self.seen: list[tuple[int, int]] = []
        self.asked: list[int] = []
        """How many changes had been told whenever it asked for activation."""
        super().__init__(
            "m/1#0",
            max_queue,
            queue_timeout_s,
            lambda: self.seen.append((self.in_flight, self.waiting)),
            lambda: self.asked.append(len(self.seen)),
        )


async def waiters(gate: Gate, count: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(gate.enter()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_an_open_gate_lets_in_at_once_and_counts() -> None:
    gate = Watched()
    gate.open()
    await gate.enter()
    await gate.enter()
    assert (gate.in_flight, gate.waiting) == (2, 0)
    gate.leave()
    gate.leave()
    assert gate.seen[-1] == (0, 0)
    await asyncio.wait_for(gate.idle(), 1)


async def test_a_closed_gate_holds_in_order_until_it_opens() -> None:
    gate = Watched()
    order: list[int] = []

    async def request(number: int) -> None:
        await gate.enter()
        order.append(number)

    tasks = [asyncio.create_task(request(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert (gate.in_flight, gate.waiting, order) == (0, 3, [])
    gate.open()
    # Those let in count at once: a Drain that follows in the same turn must see them.
    assert (gate.in_flight, gate.waiting) == (3, 0)
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]


async def test_idle_waits_for_the_last_one() -> None:
    gate = Watched()
    gate.open()
    await gate.enter()
    gate.close()
    idle = asyncio.create_task(gate.idle())
    await asyncio.sleep(0)
    assert not idle.done()
    gate.leave()
    await asyncio.wait_for(idle, 1)


async def test_a_full_queue_refuses_in_words() -> None:
    gate = Watched(max_queue=2)
    tasks = await waiters(gate, 2)
    with pytest.raises(Unavailable, match=r"m/1#0 is swapped out and 2 requests wait for it already"):
        await gate.enter()
    assert gate.waiting == 2
    gate.open()
    await asyncio.gather(*tasks)


async def test_a_missed_deadline_refuses_in_words_and_leaves_nothing_behind() -> None:
    gate = Watched(queue_timeout_s=0.01)
    with pytest.raises(Unavailable, match=r"m/1#0 was not swapped in within 0.01 s"):
        await gate.enter()
    assert (gate.in_flight, gate.waiting) == (0, 0)
    assert gate.seen[-1] == (0, 0)


async def test_new_limits_count_for_requests_that_come_later() -> None:
    gate = Watched(max_queue=3, queue_timeout_s=0.2)
    earlier = await waiters(gate, 2)
    gate.limit(max_queue=2, queue_timeout_s=0.01)
    with pytest.raises(Unavailable, match="2 requests wait for it already"):
        await gate.enter()
    assert gate.waiting == 2, "those that wait go on waiting"
    gate.limit(max_queue=3, queue_timeout_s=0.01)
    with pytest.raises(Unavailable, match=r"not swapped in within 0.01 s"):
        await gate.enter()
    assert gate.waiting == 2 and not any(task.done() for task in earlier)
    results = await asyncio.gather(*earlier, return_exceptions=True)
    assert all("within 0.2 s" in str(result) for result in results), "they keep the time that they were given"


async def test_cancelling_a_waiter_leaves_nothing_behind() -> None:
    gate = Watched()
    first, second = await waiters(gate, 2)
    first.cancel()
    await asyncio.wait([first])
    assert gate.seen[-1] == (0, 1)
    gate.open()
    await second
    assert (gate.in_flight, gate.waiting) == (1, 0)


@pytest.mark.parametrize("open_first", [True, False])
async def test_cancelling_in_the_turn_in_which_the_gate_opens_leaves_nothing_behind(open_first: bool) -> None:
    gate = Watched()
    (task,) = await waiters(gate, 1)
    if open_first:
        gate.open()
        task.cancel()
    else:
        task.cancel()
        gate.open()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (gate.in_flight, gate.waiting) == (0, 0)
    assert gate.seen[-1] == (0, 0)
    await asyncio.wait_for(gate.idle(), 1)


async def test_refusing_those_who_wait_lets_later_ones_wait_again() -> None:
    gate = Watched()
    tasks = await waiters(gate, 2)
    error = Unavailable("not enough memory")
    gate.refuse_waiting(error)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["not enough memory"] * 2
    assert results[0] is not results[1]
    assert [result.code for result in results if isinstance(result, TritonSwapError)] == ["UNAVAILABLE"] * 2
    (task,) = await waiters(gate, 1)
    assert gate.waiting == 1
    task.cancel()


async def test_refusing_all_closes_for_good() -> None:
    gate = Watched()
    gate.open()
    await gate.enter()
    gate.refuse_all(Unavailable("the swap agent is gone"))
    with pytest.raises(TritonSwapError, match="the swap agent is gone"):
        await gate.enter()
    assert gate.in_flight == 1


async def test_activation_is_asked_for_once_for_all_that_wait_after_the_first_was_counted() -> None:
    gate = Watched()
    gate.open()
    await gate.enter()
    assert gate.asked == [], "who goes straight in asks for nothing"
    gate.close()
    tasks = await waiters(gate, 3)
    assert gate.seen[-3:] == [(1, 1), (1, 2), (1, 3)]
    assert gate.asked == [gate.seen.index((1, 1)) + 1], "once, after the first one was told"
    gate.open()
    await asyncio.gather(*tasks)
    gate.close()
    assert len(gate.asked) == 1
    (later,) = await waiters(gate, 1)
    assert len(gate.asked) == 2, "what was asked for has been had"
    later.cancel()


@pytest.mark.parametrize("how", ["cancelled", "refused", "expired"])
async def test_activation_is_asked_for_again_once_nobody_waited_any_more(how: str) -> None:
    gate = Watched(queue_timeout_s=0.01 if how == "expired" else 60.0)
    first = await waiters(gate, 2)
    if how == "cancelled":
        for task in first:
            task.cancel()
    elif how == "refused":
        gate.refuse_waiting(Unavailable("no"))
    await asyncio.wait(first)
    assert gate.waiting == 0 and len(gate.asked) == 1
    second = await waiters(gate, 2)
    assert gate.waiting == 2 and len(gate.asked) == 2
    gate.open()
    await asyncio.gather(*second, *first, return_exceptions=True)


async def test_one_that_comes_while_another_leaves_is_never_forgotten() -> None:
    gate = Watched()
    (leaving,) = await waiters(gate, 1)
    leaving.cancel()
    waiting = asyncio.create_task(gate.enter())
    await asyncio.sleep(0)
    told_none = [number for number, (_, count) in enumerate(gate.seen) if not count]
    assert gate.waiting == 1 and gate.asked[-1] > max(told_none, default=-1), "after whatever withdrew the request"
    gate.open()
    await waiting
