"""Prefilled contexts in files: read once, asked many times, by many processes, also in batches."""
