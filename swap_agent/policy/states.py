"""The states of a model replica and the moves between them; nothing else changes a state."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a replica is. Only RESIDENT runs requests."""

    COLD = "COLD"
    """No engine process. There may be a mirror from which the next one is restored."""
    STARTING = "STARTING"
    """The engine process starts, loads its weights into frames and has its mirror made."""
    RESIDENT = "RESIDENT"
    """In device memory, runnable."""
    DRAINING = "DRAINING"
    """The gate is closing; requests that run finish, new ones wait."""
    SWAPPING_OUT = "SWAPPING_OUT"
    """The gate is closed; ranks unmap, then their frames return: all, or as many as others need."""
    SWAPPED = "SWAPPED"
    """Not runnable: the engine is parked, weights in the mirror. What others have not needed yet is still there."""
    SWAPPING_IN = "SWAPPING_IN"
    """The missing frames are granted and being filled."""
    FAILED = "FAILED"
    """The engine died or could not start; the reason is kept."""

    __hash__ = object.__hash__  # a member is itself only; Enum's own is Python, and took 7 % of all decisions


MOVES: dict[State, frozenset[State]] = {
    State.COLD: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.RESIDENT, State.FAILED}),
    State.RESIDENT: frozenset({State.DRAINING, State.FAILED}),
    State.DRAINING: frozenset({State.RESIDENT, State.SWAPPING_OUT, State.FAILED}),
    State.SWAPPING_OUT: frozenset({State.SWAPPED, State.FAILED}),
    State.SWAPPED: frozenset({State.SWAPPING_IN, State.SWAPPING_OUT, State.COLD, State.FAILED}),
    State.SWAPPING_IN: frozenset({State.RESIDENT, State.SWAPPED, State.FAILED}),
    State.FAILED: frozenset({State.STARTING, State.COLD}),
}
"""All legal moves."""

HOLDS_FRAMES = frozenset(State) - {State.COLD, State.FAILED}
"""States in which a replica's reserved frames count against its device."""
