"""Running the notebooks of a profile: driver, claims, manifest, report."""
