"""Checkpoints: the state of a fit, its files, and how a fit resumes from them."""
