"""Tests of hosts that use asyncio alone, where tasks are cancelled natively."""

from __future__ import annotations

import pytest

natively = pytest.mark.parametrize("run_native", ["asyncio", "uvloop"], indirect=True)
"""Run the test on both event loops of asyncio; it needs the fixture `run_native`."""
