"""Which folders are the packages: the three at the root and every package below them.

Everything else about the project is in pyproject.toml, which cannot say this: setuptools finds
packages automatically only where the folder's name is the package's name.
"""

from setuptools import find_packages, setup

ROOTS = ["callbacks", "engine", "events"]

# They are installed under one namespace: top-level modules called `events` or `callbacks` would
# clash with distributions that exist.
found = find_packages(include=[*ROOTS, *(f"{root}.*" for root in ROOTS)])
setup(
    packages=[f"eventrain.{name}" for name in found],
    package_dir={f"eventrain.{root}": root for root in ROOTS},
)
