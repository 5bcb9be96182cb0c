"""What the notebooks compute, a module each."""
