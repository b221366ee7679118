"""Entry of an engine host: `python -m vllm_engine --runtime-dir D --replica NAME/VERSION#I --token T`.

The agent starts it. EngineCore is a fork of it (adapter/fork.py). Where that cannot be, and for the workers of several
ranks, vLLM uses multiprocessing's `spawn`, which runs this file again in each new process under the name `__mp_main__`,
before anything else: that is where each new process is tied to the life of its parent.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run one engine host until its agent ends it. Returns the exit status."""
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(prog="python -m vllm_engine", description="An engine host.")
    parser.add_argument("--runtime-dir", type=Path, required=True, help="where agent.sock is")
    parser.add_argument("--replica", required=True, help="NAME/VERSION#INSTANCE")
    parser.add_argument("--token", required=True, help="proves to the agent that it started this process")
    options = parser.parse_args(argv)

    from vllm_engine.adapter.fork import importing

    with importing():
        from vllm_engine.adapter.start import run

    return run(options.runtime_dir, options.replica, options.token)


if __name__ == "__main__":
    # With a spec that says `vllm_engine.__main__`, `spawn` would skip this file; without one it runs it by its path.
    __spec__ = None
    sys.exit(main())
elif __name__ == "__mp_main__":
    from swap_agent.linux import die_with_parent

    die_with_parent()
