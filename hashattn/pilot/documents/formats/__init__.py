"""Texts of files of each kind; only the process that reads (`child`) imports these."""
