"""`python -m swap_agent` is the command `triton-swap`."""

import sys

from swap_agent.cli.main import main

sys.exit(main())
