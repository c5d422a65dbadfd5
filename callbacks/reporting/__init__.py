"""Callbacks that report a run to logs, traces, metrics, files and displays."""
