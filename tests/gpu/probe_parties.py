"""The processes of the probe: an agent that owns frames, and clients that map what they are granted.

Each is a fresh interpreter that does what it is told, line by line, over the socket given: `{"do": METHOD, …}` is
answered by `{"value": …}` or `{"error": TRACEBACK}`. Frames go from agent to client over a socket of their own.
"""

from __future__ import annotations

import socket
import sys

from probe_agent import Agent
from probe_client import Client


def main() -> None:
    """`agent CONTROL LISTENING` or `client CONTROL NAME PATH`: numbers of sockets, and the path of the agent's."""
    role, control, *rest = sys.argv[1:]
    party = Agent(socket.socket(fileno=int(rest[0]))) if role == "agent" else Client(*rest)
    party.serve(socket.socket(fileno=int(control)))


if __name__ == "__main__":
    main()
