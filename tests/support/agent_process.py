"""A real agent with scripted engines and its admin API, a process of its own, to be killed.

python agent_process.py RUNTIME_DIR FRAMES [MODEL_REPOSITORY]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.devices import spec
from swap_agent.daemon.agent import Agent
from swap_agent.daemon.config import AgentConfig, RuntimeDir

ENGINE = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")))


async def main() -> None:
    device = spec(int(sys.argv[2]))
    runtime = RuntimeDir(Path(sys.argv[1]))
    repositories = tuple(Path(path) for path in sys.argv[3:])
    agent = Agent(
        AgentConfig(runtime, device, port=0, model_repositories=repositories, engine_command=ENGINE, drain_timeout_s=1)
    )
    async with agent.running():
        await agent.admin_api.serve(agent.config)
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
