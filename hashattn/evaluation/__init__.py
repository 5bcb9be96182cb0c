"""Evaluation: records, protocols, a resumable runner, statistics, recall."""

from hashattn.base.lazy import lazy

_EXPORTS = {
    "Method": "hashattn.evaluation.methods",
    "Protocol": "hashattn.evaluation.protocol",
    "Record": "hashattn.evaluation.records",
    "authors": "hashattn.evaluation.benchmarks.longbench_authors",
    "bucket_table": "hashattn.evaluation.tables",
    "by_the_book": "hashattn.evaluation.benchmarks.longbench_protocol",
    "comparison_table": "hashattn.evaluation.tables",
    "cut_note": "hashattn.evaluation.tables",
    "dataset_table": "hashattn.evaluation.tables",
    "density_table": "hashattn.evaluation.tables",
    "evaluate": "hashattn.evaluation.runner",
    "fine_tuning_sequences": "hashattn.evaluation.fine_tuning",
    "fine_tuning_split": "hashattn.evaluation.benchmarks.longbench",
    "load_dataset": "hashattn.evaluation.benchmarks.longbench",
    "load_prompts": "hashattn.evaluation.benchmarks.longbench_protocol",
    "load_records": "hashattn.evaluation.records",
    "paired_bootstrap": "hashattn.evaluation.statistics",
    "selection_metrics": "hashattn.evaluation.measures.selection",
    "save_records": "hashattn.evaluation.records",
    "score_table": "hashattn.evaluation.tables",
    "setup_table": "hashattn.evaluation.tables",
    "sharing_table": "hashattn.evaluation.tables",
}
__all__ = sorted(_EXPORTS)
__getattr__ = lazy(__name__, _EXPORTS)
