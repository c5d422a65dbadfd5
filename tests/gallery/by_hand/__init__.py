"""The trainings of examples/gallery as plain PyTorch loops.

Each file has `train(**fit)`, which returns the modules that it has trained.
"""
