from __future__ import annotations

import asyncio

import pytest

from swap_agent.errors import TritonSwapError, Unavailable
from vllm_engine.host.gate import Gate


class Watched(Gate):
    """A gate that records its counts at every change."""

    def __init__(self, max_queue: int = 8, queue_timeout_s: float = 60.0) -> None:
        self.seen: list[tuple[int, int]] = []
        super().__init__("m/1#0", max_queue, queue_timeout_s, lambda: self.seen.append((self.in_flight, self.waiting)))


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
