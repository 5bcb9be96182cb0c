"""A company's files as texts, and its questions about them; nothing leaves the machine."""

from hashattn.base.lazy import lazy

_EXPORTS = {
    "DocumentsError": "hashattn.pilot.documents.skipped",
    "Library": "hashattn.pilot.documents.library",
    "Question": "hashattn.pilot.documents.questions",
    "QuestionsError": "hashattn.pilot.documents.questions",
    "read_documents": "hashattn.pilot.documents.library",
    "read_questions": "hashattn.pilot.documents.questions",
    "ReadLimits": "hashattn.pilot.documents.limits",
    "Skipped": "hashattn.pilot.documents.skipped",
    "SourceDocument": "hashattn.pilot.documents.library",
}
__all__ = sorted(_EXPORTS)
__getattr__ = lazy(__name__, _EXPORTS)
