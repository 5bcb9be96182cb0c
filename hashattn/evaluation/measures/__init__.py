"""Measures of what a selector selects, beside scores of answers."""
