"""Trust at run time, for operators: audit of what was read, drift alarms, retraining."""
