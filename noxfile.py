"""The checks, each in an environment of its own: `nox` runs all but `lowest`, `nox -l` lists them.

`nox -s tests-3.12 -- tests/events -k bus` passes what follows `--` to pytest.
"""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "imports", "types", "docs", "package", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
OLDEST, *NEWER = "3.11", "3.12", "3.13", "3.14"
ALL_TESTS = ["--cov", "-n", "2", "--dist", "loadfile"]


def group(name: str) -> list[str]:
    """The requirements of a dependency group, for a pip that does not know groups, too."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


@nox.session(python=[OLDEST, *NEWER])
def tests(session: nox.Session) -> None:
    """All tests, or those that are named."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or ALL_TESTS))


@nox.session(python=OLDEST, venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """The tests with the lowest versions that pyproject.toml allows.

    Without a GPU, set UV_TORCH_BACKEND=cpu: the CUDA builds of torch 2.10 and 2.11 crash there
    when a second thread compiles (fixed in 2.12: https://github.com/pytorch/pytorch/pull/178950).
    """
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or ALL_TESTS))


@nox.session
def lint(session: nox.Session) -> None:
    """Style and spelling."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")


@nox.session
def imports(session: nox.Session) -> None:
    """The directions that imports may have. It reads the files, and so needs no dependencies."""
    session.install(*group("imports"))
    session.install("--no-deps", "-e", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, on the package as users install it, which an editable install is not."""
    shutil.rmtree("build", ignore_errors=True)  # what an earlier build left would be installed
    session.install(".[test]", *group("types"))
    session.run("mypy")
    others = ["-p", "examples", "-p", "benchmarks", "-m", "tests.typed"]
    session.run("mypy", "--config-file", "pyproject.toml", *others)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in `site/`; every warning is an error."""
    session.install(*group("docs"))
    session.run("mkdocs", "build", "--strict")


@nox.session
def package(session: nox.Session) -> None:
    """The sdist and the wheel, and what PyPI would say of them."""
    session.install(*group("package"))
    for folder in ("build", "dist"):
        shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
