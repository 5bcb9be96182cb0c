"""Audit: what was read for an answer, what dense attention would have read, what was missed."""
