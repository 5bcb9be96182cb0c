"""Benchmarks: what is asked, and by which protocol."""
