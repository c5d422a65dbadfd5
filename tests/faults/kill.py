"""Kill trainings by SIGKILL, resume them, and compare: python -m tests.faults.kill [--kills 200]

Half of the kills come at a random moment, half inside a random operation of a save. After each,
every checkpoint that is there must be whole; at the end weights, metrics, history, counts and
journal must be those of the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from eventrain.callbacks import compare_runs
from eventrain.engine import Checkpoint

from . import training

KILLS_A_RUN = 20


def kill(kind: str, kills: int, seed: int) -> Counter[str]:
    """Kill trainings `kills` times; return how often what was seen.

    Raises:
        CheckpointError: a checkpoint was not whole.
        AssertionError: a run did not come out the same.
    """
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    context = multiprocessing.get_context("forkserver")  # each process is a fork of a fresh one
    context.set_forkserver_preload([training.__name__])
    with tempfile.TemporaryDirectory() as name:
        for alone in Path(name, "first"), Path(name, "alone"):  # the first waits for the imports
            alone.mkdir()
            begin = time.monotonic()
            assert _run(context, kind, alone, None, None) == 0
            duration = time.monotonic() - begin
        while seen["kills"] < kills:
            folder = Path(name, str(seen["runs"]))
            folder.mkdir()
            for _ in range(min(KILLS_A_RUN, kills - seen["kills"])):
                in_save = chance.random() < 0.5
                dies_at = chance.randrange(1, 40) if in_save else None
                after = None if in_save else chance.uniform(0, duration)
                code = _run(context, kind, folder, dies_at, after)
                assert code in (0, -signal.SIGKILL), code
                if code == 0:
                    break
                seen["kills"] += 1
                seen["in a save" if in_save else "at a random moment"] += 1
                found = sorted((folder / "checkpoints").glob("checkpoint-*"))
                for path in found:
                    Checkpoint.load(path)
                seen["checkpoints read"] += len(found)
                seen["unfinished"] += any((folder / "checkpoints").glob(".unfinished-*"))
            assert _run(context, kind, folder, None, None) == 0
            _compare(alone, folder)
            seen["runs"] += 1
    return seen


def _run(
    context: multiprocessing.context.ForkServerContext,
    kind: str,
    folder: Path,
    dies_at: int | None,
    after: float | None,
) -> int | None:
    """Train in a process, killed after so many seconds; return its exit code."""
    process = context.Process(target=training.train, args=(kind, folder, dies_at))
    process.start()
    process.join(120 if after is None else after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _compare(alone: Path, killed: Path) -> None:
    difference = compare_runs(alone / "journal.jsonl", killed / "journal.jsonl")
    assert difference is None, str(difference)
    outcomes = [json.loads((folder / "outcome.json").read_text()) for folder in (alone, killed)]
    assert outcomes[0] == outcomes[1]


def main() -> None:
    """Print a table of what was done, and seen."""
    parser = argparse.ArgumentParser(prog="tests.faults.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for kind in training.MADE:
        begin = time.monotonic()
        seen = kill(kind, args.kills, args.seed)
        told = ", ".join(f"{n} {what}" for what, n in sorted(seen.items()))
        print(f"{kind}: {told}; all as undisturbed; {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
