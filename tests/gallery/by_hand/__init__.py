"""The trainings of examples/gallery as plain PyTorch loops.

Each file has `train(**fit)`, which returns the module that it has trained, or a tuple with others
that change with it.
"""
