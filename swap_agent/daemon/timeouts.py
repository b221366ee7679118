"""How long the agent waits for what, and how often it looks: all of its timing constants, in seconds.

An inner wait ends before the outer one that contains it, so that the error a user sees is the one that says most.
tests/unit/test_timeouts.py asserts that order, which continues in the engine (`vllm_engine.rank.agent_link`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Given by `AgentConfig`; a test gives shorter ones."""

    # --- answers ---
    hello_s: float = 10.0
    """For the first message of a rank's connection."""
    ack_s: float = 60.0
    """For a rank to map or unmap, and for its host to say so. Then the engine counts as hung, and is killed."""
    between_steps_s: float = 600.0
    """The same while the engine serves: it obeys between two of vLLM's steps. A long prompt takes minutes on a CPU."""
    frames_s: float = 90.0
    """For frames that other engines give back to a swap-in. Longer than `ack_s` and the end of an engine that does not
    answer in time; shorter than a rank waits for its grants."""

    # --- ends ---
    kill_margin_s: float = 2.0
    """Beyond --drain-timeout: for an engine that was told to stop to end by itself, before it is killed."""
    lost_rank_s: float = 5.0
    """For an engine that has lost a rank to end by itself, telling its clients, before it is killed."""
    busy_s: float = 5.0
    """For a device to clear away the memory of a killed process; until then it may refuse memory that is free."""

    # --- looks ---
    audit_s: float = 0.1
    """Between two comparisons of the ledger with the pools."""
    host_memory_s: float = 5.0
    """Between two measurements of what mirrors and engine processes take of the host's memory."""
    residue_s: float = 5.0
    """Between two measurements of residues; more often when --outside-grace is shorter."""
    baseline_s: float = 0.2
    """How soon after an engine has become ready its residue is measured for the first time."""
