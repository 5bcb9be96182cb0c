"""Reproduction: run the notebooks of a profile, keep what they claim, write the report.

`python -m hashattn.reproduce --profile embedded` is what `make reproduce` calls.
"""

from hashattn.reproduce.notebooks.claims import ClaimError, Claims

__all__ = ["ClaimError", "Claims"]
