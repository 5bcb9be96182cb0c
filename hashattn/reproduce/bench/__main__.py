"""python -m hashattn.reproduce.bench WHAT [--output FILE], WHAT one of cpu, gpu, quality, llamacpp,
offload, model, readme.

`make bench` and `make gpu` run the first two. quality renews the record of output errors, llamacpp
measures that side by side alone, offload a cache whose rows lie in a file, model prints what a GPU
should take, readme the README's tables of the results that come with the repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hashattn.base.errors import HashAttnError
from hashattn.base.repository import repository

_WHAT = ("cpu", "gpu", "quality", "llamacpp", "offload", "model", "readme")


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark. Exit status: 0 done, 2 failed (the reason is on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m hashattn.reproduce.bench", description=__doc__)
    parser.add_argument("what", choices=_WHAT)
    parser.add_argument("--output", type=Path, help="result file, default results/bench/WHAT.json")
    options = parser.parse_args(arguments)
    if options.what == "model":
        from hashattn.reproduce.bench import gpu_model

        print(gpu_model.table().round(1).to_string(), gpu_model.paragraph(), sep="\n\n")
        return 0
    if options.what == "readme":
        from hashattn.reproduce.bench import readme, reference

        record = reference.stored("cpu")
        print(*readme.sections(record) if record else ["no results are stored"], sep="\n\n")
        return 0
    path = options.output or repository() / "results" / "bench" / f"{options.what}.json"
    try:
        if options.what == "cpu":
            from hashattn.reproduce.bench.cpu import bench
        elif options.what == "gpu":
            from hashattn.reproduce.bench.gpu import bench
        elif options.what == "quality":
            from hashattn.reproduce.bench.quality import path as record
            from hashattn.reproduce.experiments.reading import write_record as bench

            path = options.output or record()
        elif options.what == "offload":
            from hashattn.reproduce.bench.offload import bench
        else:
            from hashattn.reproduce.bench.llamacpp import bench
        bench(path)
    except HashAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
