"""`python -m sagellm.comm.collective_ops info|bench|explain|doctor`."""

from ._cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
