"""The benchmarks that a profile's `benchmark` may name: one file and one line here for each."""

from hashattn.evaluation.benchmarks import (
    crowded,
    folder,
    generated,
    longbench_authors,
    longbench_protocol,
    packages,
    ruler,
    texts,
)
from hashattn.evaluation.benchmarks.base import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "generated": generated.BENCHMARK,
    "crowded": crowded.BENCHMARK,
    "folder": folder.BENCHMARK,
    "longbench": longbench_protocol.BENCHMARK,
    "longbench_authors": longbench_authors.BENCHMARK,
    "packages": packages.BENCHMARK,
    "ruler": ruler.BENCHMARK,
    "texts": texts.BENCHMARK,
}


def usual_benchmark(data: str | None) -> str:
    """What a profile that names none asks: its own files, or generated tasks without any."""
    return "generated" if data is None else "folder"
