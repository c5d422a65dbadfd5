"""What `fit(resume=...)` accepts, and what a resumed fit takes over."""

from __future__ import annotations

from pathlib import Path

import pytest
from eventrain.callbacks import (
    CheckpointCB,
)
from eventrain.engine import (
    CheckpointError,
)
from eventrain.events import (
    BeforeBatch,
    BeforeFit,
    record_events,
)
from structlog.testing import capture_logs

from tests.support.resuming import EPOCH, assert_same, disturb, make_learner, outcome, undisturbed


def test_a_resumed_fit_has_the_learning_rate_that_it_had(done: Path) -> None:
    with pytest.raises(ValueError, match=r"lr=0\.5: a resumed fit keeps the learning rate"):
        make_learner().run(2, lr=0.5, resume=done)
    learner = make_learner(lr=123.0)
    rates = []
    learner.subscribe(BeforeBatch, lambda event: rates.append(event.lr))
    learner.run(2, resume=done)
    assert rates == [0.05] * EPOCH


@pytest.mark.parametrize("n", [0, 2])
def test_the_last_checkpoint_is_that_of_the_one_callback(n: int, tmp_path: Path) -> None:
    cbs = [CheckpointCB(tmp_path / str(i)) for i in range(n)]
    with pytest.raises(ValueError, match=f"and there are {n} of them: pass a path"):
        make_learner().run(1, cbs=cbs, resume="last")


@pytest.mark.parametrize("name", ["", "nowhere", "a file"])
def test_where_no_checkpoint_is_the_fit_says_so(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("no folder")
    learner = make_learner()
    with record_events(learner) as events:
        with pytest.raises(CheckpointError, match=name or str(tmp_path)):
            learner.run(1, resume=tmp_path / name)
    assert events == []  # it has not begun
    assert learner.run(1).status == "completed"


def test_of_nothing_yet_the_last_is_a_beginning_which_is_told(tmp_path: Path) -> None:
    with capture_logs() as logs:
        learner = make_learner()
        result = learner.run(1, cbs=CheckpointCB(tmp_path / "new"), resume="last")
    (line,) = logs
    assert (line["event"], line["folder"]) == ("nothing_to_resume", str(tmp_path / "new"))
    assert (result.status, result.resumed_from, result.epochs) == ("completed", None, 1)
    assert learner.resumed_from is None


@pytest.mark.parametrize("as_text", [False, True])
def test_a_path_is_one_checkpoint_or_a_folder_of_them(as_text: bool, tmp_path: Path) -> None:
    expected = undisturbed(make_learner, 3)
    disturb(0)
    make_learner().run(3, cbs=CheckpointCB(tmp_path, keep_last=None))
    for name in ("checkpoint-000001", "checkpoint-000002", "."):
        path = tmp_path / name
        learner = make_learner()
        result = learner.run(3, resume=str(path) if as_text else path)
        assert Path(result.resumed_from or "").name == name.replace(".", "checkpoint-000003")
        assert_same(outcome(learner, result), expected)


def test_the_run_keeps_its_name_unless_it_is_given_another(done: Path) -> None:
    names: list[tuple[str, Path | None]] = []
    learner = make_learner()
    learner.subscribe(
        BeforeFit, lambda event: names.append((event.run_id, event.learner.resumed_from))
    )
    assert learner.run(2, resume=done).run_id == learner.run_id == "done"
    assert learner.run(2, resume=done, run_id="again").run_id == learner.run_id == "again"
    path = done / "checkpoint-000001"
    assert names == [("done", path), ("again", path)]
