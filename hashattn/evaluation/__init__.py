"""Evaluation: records, protocols, a resumable runner, statistics, recall."""

from importlib import import_module

_EXPORTS = {
    "Method": "methods",
    "Protocol": "protocol",
    "Record": "records",
    "authors": "benchmarks.longbench_authors",
    "bucket_table": "tables",
    "by_the_book": "benchmarks.longbench_protocol",
    "comparison_table": "tables",
    "cut_note": "tables",
    "dataset_table": "tables",
    "density_table": "tables",
    "evaluate": "runner",
    "fine_tuning_sequences": "fine_tuning",
    "fine_tuning_split": "benchmarks.longbench",
    "load_dataset": "benchmarks.longbench",
    "load_prompts": "benchmarks.longbench_protocol",
    "load_records": "records",
    "paired_bootstrap": "statistics",
    "selection_metrics": "measures.selection",
    "save_records": "records",
    "score_table": "tables",
    "setup_table": "tables",
    "sharing_table": "tables",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Imports a name when it is first used: pandas and transformers stay out until then."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
