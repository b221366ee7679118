"""Which wait of the agent must be shorter than which."""

from __future__ import annotations

from swap_agent.cli import supervisor
from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.policy.room import RECALL_S
from vllm_engine.rank import agent_link


def test_an_inner_wait_ends_before_the_one_that_contains_it() -> None:
    t = Timeouts()
    assert t.hello_s < t.ack_s
    assert t.ack_s + t.busy_s < t.frames_s, (
        "an engine that hangs while it unmaps is killed, and its frames come in time"
    )
    assert t.frames_s < agent_link.SWAP_TIMEOUT_S < agent_link.START_TIMEOUT_S, "the agent says why no frames come"
    assert t.ack_s < t.between_steps_s, "an engine that serves obeys later than one that is paused"
    assert t.between_steps_s > RECALL_S


def test_an_engine_has_ended_before_serve_kills_its_agent() -> None:
    drain_timeout_s = AgentConfig.drain_timeout_s  # its default
    t = Timeouts()
    assert (
        drain_timeout_s + t.kill_margin_s + t.busy_s
        < supervisor.AGENT_STOP_TIMEOUT_S
        < supervisor.TRITON_STOP_TIMEOUT_S
    )
    assert t.lost_rank_s < drain_timeout_s, "an engine without one of its ranks has nothing to finish"


def test_looks_are_frequent_enough() -> None:
    t = Timeouts()
    assert t.audit_s < t.baseline_s < t.residue_s
    assert 0 < t.host_memory_s <= 5 and t.residue_s <= 5, "host memory and residues are in force within seconds"
