"""`python -m sagellm.comm.kv_transfer serve|send|probe|bench|doctor`."""

from ._cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
