"""python -m hashattn.bench cpu|gpu [--output FILE]: what `make bench` and `make gpu` run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hashattn.base.repository import repository
from hashattn.errors import HashAttnError


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark; 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m hashattn.bench", description=__doc__)
    parser.add_argument("device", choices=("cpu", "gpu"))
    parser.add_argument(
        "--output", type=Path, help="result file, default results/bench/DEVICE.json"
    )
    asked = parser.parse_args(arguments)
    path = asked.output or repository() / "results" / "bench" / f"{asked.device}.json"
    try:
        if asked.device == "cpu":
            from hashattn.bench.cpu import bench
        else:
            from hashattn.bench.gpu import bench
        bench(path)
    except HashAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
