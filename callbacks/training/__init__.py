"""Callbacks that change how a batch is trained."""
