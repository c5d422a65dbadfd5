"""Callbacks that measure a run."""
