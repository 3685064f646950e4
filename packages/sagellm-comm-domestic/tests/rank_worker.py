"""One rank of a pool: reads a scenario's name per line, runs it, writes its answer as JSON."""

import json
import os
import sys
import traceback


def main() -> None:
    vendor = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints goes to stderr
    if vendor != "cpu":
        from sagellm.comm.domestic import emulate

        emulate(vendor)
    import scenarios

    state = scenarios.State(vendor)
    print("ready", file=answers)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"result": getattr(scenarios, name)(state, **arguments)}
        except BaseException as e:
            answer = {"error": f"{type(e).__name__}: {e}", "trace": traceback.format_exc()}
        print(json.dumps(answer), file=answers)
    state.close()


if __name__ == "__main__":
    main()
