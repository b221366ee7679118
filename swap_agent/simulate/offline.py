"""The least that must be copied when all requests are known before: no policy can copy less. Small cases only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def least_copied(
    weights: Sequence[int], kv: Sequence[int], frames: int, held: Sequence[int], requests: Sequence[int]
) -> int:
    """Frames copied to one device of `frames` when `requests` (places of models) are served one after the other.

    `weights` and `kv` are the frames of each model, `held` those of its weights that are there at first. Exact, by
    dynamic programming over what each model holds: while a model runs it holds all of its own, others keep what fits,
    in any parts. To hold less than fits, or to copy before a request comes, never copies less.
    """
    costs = {tuple(held): 0}
    for wanted in requests:
        room = frames - weights[wanted] - kv[wanted]
        if room < 0:
            raise ValueError(f"model {wanted} does not fit")
        after: dict[tuple[int, ...], int] = {}
        for state, cost in costs.items():
            missing = weights[wanted] - state[wanted]
            others = [0 if place == wanted else parts for place, parts in enumerate(state)]
            for kept in _kept(others, min(room, sum(others))):
                new = (*kept[:wanted], weights[wanted], *kept[wanted + 1 :])
                after[new] = min(cost + missing, after.get(new, cost + missing))
        costs = after
    return min(costs.values())


def _kept(most: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """All ways to keep `total` frames, of each model no more than `most`."""
    if not most:
        if total == 0:
            yield ()
        return
    rest = sum(most[1:])
    for first in range(max(0, total - rest), min(most[0], total) + 1):
        for others in _kept(most[1:], total - first):
            yield (first, *others)
