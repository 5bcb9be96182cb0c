"""Trust at run time, for operators: audit of what was read, a budget that fits the step, drift
alarms, retraining."""

from hashattn.base.lazy import lazy

_EXPORTS = {
    "Adaptation": "hashattn.trust.retraining.outcome",
    "AdaptSettings": "hashattn.trust.retraining.adapt",
    "adapt": "hashattn.trust.retraining.adapt",
    "append_report": "hashattn.trust.drift.export",
    "Audit": "hashattn.trust.audit.listener",
    "AuditError": "hashattn.trust.audit.source",
    "AuditSettings": "hashattn.trust.audit.listener",
    "calibrate_fallback": "hashattn.trust.fallback.calibrate",
    "calibrate_fallbacks": "hashattn.trust.fallback.calibrate",
    "captured_tokens": "hashattn.trust.retraining.captures",
    "Document": "hashattn.trust.audit.source",
    "draw_evidence": "hashattn.trust.drift.export",
    "draw_missed": "hashattn.trust.audit.figure",
    "drift_study": "hashattn.trust.drift.study",
    "DriftCalibrator": "hashattn.trust.drift.calibration",
    "DriftMonitor": "hashattn.trust.drift.monitor",
    "DriftReference": "hashattn.trust.drift.reference",
    "DriftReport": "hashattn.trust.drift.report",
    "DriftSettings": "hashattn.trust.drift.monitor",
    "Evidence": "hashattn.trust.audit.evidence",
    "find_documents": "hashattn.trust.audit.source",
    "kind_sequences": "hashattn.trust.drift.study",
    "prometheus_text": "hashattn.trust.drift.export",
    "read_sequences": "hashattn.trust.drift.study",
    "Reservoir": "hashattn.trust.retraining.reservoir",
    "ReservoirSettings": "hashattn.trust.retraining.reservoir",
    "run_rows": "hashattn.trust.drift.study",
    "save_page": "hashattn.trust.audit.page",
    "Source": "hashattn.trust.audit.source",
    "text_sequences": "hashattn.trust.retraining.captures",
    "Versions": "hashattn.trust.retraining.versions",
}
__all__ = sorted(_EXPORTS)
__getattr__ = lazy(__name__, _EXPORTS)
