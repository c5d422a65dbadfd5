"""The journal of a run, and the comparison of two."""
