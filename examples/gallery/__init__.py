"""Well-known trainings, one file each: `python -m examples.gallery.NAME`.

Each file has `make_learner()`, the arguments of its fit (`FIT`), and `main()`.
"""
