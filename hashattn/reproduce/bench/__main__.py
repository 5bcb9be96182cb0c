"""python -m hashattn.reproduce.bench cpu|gpu [--output FILE]: `make bench` and `make gpu`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hashattn.base.errors import HashAttnError
from hashattn.base.repository import repository


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark. Exit status: 0 done, 2 failed (the reason is on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m hashattn.reproduce.bench", description=__doc__)
    parser.add_argument("device", choices=("cpu", "gpu"))
    parser.add_argument(
        "--output", type=Path, help="result file, default results/bench/DEVICE.json"
    )
    options = parser.parse_args(arguments)
    path = options.output or repository() / "results" / "bench" / f"{options.device}.json"
    try:
        if options.device == "cpu":
            from hashattn.reproduce.bench.cpu import bench
        else:
            from hashattn.reproduce.bench.gpu import bench
        bench(path)
    except HashAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
