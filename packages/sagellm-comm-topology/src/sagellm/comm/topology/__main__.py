"""`python -m sagellm.comm.topology`: look at a machine from the command line."""

import sys

from ._cli import main as main

if __name__ == "__main__":
    sys.exit(main())
