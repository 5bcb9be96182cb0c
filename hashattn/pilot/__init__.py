"""A pilot, for companies: own documents read, a model's answers over them dense and sparse, and a
report that says whether sparse attention helps and what it saves."""

from hashattn.base.lazy import lazy

_EXPORTS = {
    "changed_answers": "hashattn.pilot.evidence",
    "choose_codes": "hashattn.pilot.codes",
    "device_named": "hashattn.pilot.capacity.devices",
    "judge": "hashattn.pilot.judgement",
    "make_plan": "hashattn.pilot.plan",
    "measure": "hashattn.pilot.measurements",
    "choose_reading": "hashattn.pilot.reading",
    "methods": "hashattn.pilot.reading",
    "model_shape": "hashattn.pilot.capacity.shapes",
    "nothing_leaves": "hashattn.pilot.privacy",
    "pilot_result": "hashattn.pilot.outcome",
    "PilotSettings": "hashattn.pilot.settings",
    "preflight": "hashattn.pilot.capacity.preflight",
    "read_documents": "hashattn.pilot.documents.library",
    "read_questions": "hashattn.pilot.documents.questions",
    "save_report": "hashattn.pilot.report.files",
    "step_times": "hashattn.pilot.latency",
    "summary": "hashattn.pilot.capacity.wording",
    "Workload": "hashattn.pilot.capacity.result",
}
__all__ = sorted(_EXPORTS)
__getattr__ = lazy(__name__, _EXPORTS)
