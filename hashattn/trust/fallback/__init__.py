"""Calibration of the verified fallback (hashattn.attention.fallback) on captured traffic."""
