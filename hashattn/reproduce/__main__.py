"""Command line: python -m hashattn.reproduce --profile embedded."""

import argparse
import signal
import sys
import time
from pathlib import Path

from hashattn.base.errors import HashAttnError
from hashattn.reproduce.notebooks.driver import elapsed, reproduce


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed (the reason is on stderr), 130 interrupted."""
    parser = argparse.ArgumentParser(prog="hashattn.reproduce", description=__doc__)
    parser.add_argument("--profile", help="a name in data/profiles, or the path of a .yaml file")
    parser.add_argument("--notebooks", type=Path, help="a folder of NN_name.ipynb files")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the kernel as Ctrl-C does
    start = time.monotonic()
    try:
        reproduce(options.profile, options.notebooks)
    except HashAttnError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished notebooks are kept, run again to resume", file=sys.stderr)
        return 130
    print(f"done in {elapsed(start)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
