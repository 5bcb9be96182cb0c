"""Command line: python -m hashattn.reproduce --profile embedded."""

import argparse
import sys
from pathlib import Path

from hashattn.reproduce.notebooks.driver import exit_status, reproduce


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed (the reason is on stderr), 130 interrupted."""
    parser = argparse.ArgumentParser(prog="hashattn.reproduce", description=__doc__)
    parser.add_argument("--profile", help="a name in data/profiles, or the path of a .yaml file")
    parser.add_argument("--notebooks", type=Path, help="a folder of NN_name.ipynb files")
    options = parser.parse_args(arguments)
    return exit_status(
        lambda: reproduce(options.profile, options.notebooks), "finished notebooks are kept"
    )


if __name__ == "__main__":
    sys.exit(main())
