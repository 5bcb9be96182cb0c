"""Retraining: hash weights learn recent traffic; versions of them, and the way back."""
