"""Tests on a device other than the CPU: a stand-in for one, in a process of its own.

The stand-in changes torch for the whole process. So the tests of each file here are run by another
pytest, which is started once per file; in this one, a test only passes on its outcome there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

LIMIT = 400
"""Seconds after which the other process is killed."""
RESULTS = os.environ.get("EVENTRAIN_STANDIN_RESULTS")
"""The file that the other process writes the outcomes to; here it is None."""

if RESULTS is not None:
    with warnings.catch_warnings(action="ignore"):
        import torcheval.metrics  # noqa: F401 - it compiles functions of torch that are replaced

    from tests.support import accelerator

    accelerator.install()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the other process: write down the outcome of a test."""
    if RESULTS is not None and (report.when == "call" or report.outcome != "passed"):
        with Path(RESULTS).open("a") as file:
            print(json.dumps([report.nodeid, report.outcome, report.longreprtext]), file=file)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str]]:
    """The outcome and the report of every test of the file, by the name of the test."""
    if RESULTS is not None:
        return {}
    file = tmp_path_factory.mktemp("standin") / "results"
    names = [item.nodeid for item in request.session.items if item.path == request.node.path]
    root = request.config.rootpath
    try:
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names],
            cwd=root,
            env={**os.environ, "EVENTRAIN_STANDIN_RESULTS": str(file)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        output = f"the process ended with {process.returncode}\n{process.stdout}"
    except subprocess.TimeoutExpired as exc:
        output = f"killed after {LIMIT} seconds\n{exc.stdout!s}"
    found = dict.fromkeys(names, ("missing", output))
    for line in file.read_text().splitlines() if file.exists() else []:
        name, outcome, report = json.loads(line)
        found[name] = (outcome, report)
    return found


@pytest.fixture(autouse=True)
def _outcomes(outcomes: object) -> None:
    """Have every test ask for the outcomes, before it is run."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Instead of running a test: pass, skip or fail as it did in the other process."""
    if RESULTS is not None:
        return None
    outcome, report = pyfuncitem.funcargs["outcomes"][pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(report)
    if outcome != "passed":
        pytest.fail(f"{outcome} on the stand-in:\n{report}", pytrace=False)
    return True
