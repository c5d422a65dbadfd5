"""The example notebook, in a real kernel: what its reader sees."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"

PRINTING = """
from eventrain.events import AfterEpoch

def tell(event):
    print("said", event.epoch, event.training)

with learner.subscribe(AfterEpoch, tell):
    await learner.fit(2, cbs=ProgressCB())
"""
FAILING = """
def fail(event):
    raise ValueError("broken")

try:
    with learner.subscribe(AfterEpoch, fail, where=lambda event: event.epoch == 1):
        await learner.fit(5, cbs=[ProgressCB(), LossCurveCB()])
except ValueError as error:
    print(error)
"""


@dataclass
class Run:
    """A notebook that has run."""

    cells: dict[str, Any]
    messages: Counter[tuple[str, str]]  # by cell and type
    stderr: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The example, with two cells more, in a kernel of this interpreter."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import matplotlib.font_manager  # noqa: F401 - it may make its cache, and says so: here then
    import nbformat
    from nbclient import NotebookClient

    messages: Counter[tuple[str, str]] = Counter()

    class Client(NotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            messages[cell.id, msg["msg_type"]] += 1
            return super().process_message(msg, cell, cell_index)

    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernels" / "this").mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": [*command, "--log-level=ERROR"], "display_name": "", "language": "python"}
    (folder / "kernels" / "this" / "kernel.json").write_text(json.dumps(spec))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for name, source in (("printing", PRINTING), ("failing", FAILING)):
        notebook.cells.append(nbformat.v4.new_code_cell(source, id=name))
    with (folder / "stderr").open("w+") as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder))
        patch.setenv("IPYTHONDIR", str(folder))
        path = {"metadata": {"path": str(folder)}}
        client = Client(notebook, kernel_name="this", timeout=120, resources=path)
        client.execute(stderr=stderr)
        stderr.seek(0)
        return Run({cell.id: cell for cell in notebook.cells}, messages, stderr.read())


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def displayed(cell: Any) -> list[dict[str, Any]]:
    return [output.data for output in cell.outputs if output.output_type != "stream"]


def lines(data: dict[str, Any]) -> list[str]:
    """What is to be read there, without colors."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", data["text/plain"])
    return [line.rstrip() for line in text.splitlines()]


def test_the_progress_ends_as_the_table_and_the_curve_as_a_picture(run: Run) -> None:
    fit = run.cells["fit"]
    assert printed(fit) == "completed\n"
    progress, curve = sorted(displayed(fit), key=lambda data: "image/png" in data)
    header, _, first, second, end = lines(progress)
    assert header == "epoch   train accuracy   train loss   valid accuracy   valid loss"
    assert re.fullmatch(r" +1( +0\.\d+| +\d\.\d+){4}", first)
    assert re.fullmatch(r" +2( +0\.\d+| +\d\.\d+){4}", second)
    assert end == "completed 2 epochs"
    assert "completed 2 epochs" in progress["text/html"]
    assert len(curve["image/png"]) > 10_000
    assert run.messages["fit", "display_data"] == 2
    assert run.messages["fit", "update_display_data"] >= 3


def test_the_plot_of_the_metrics_is_the_result_of_its_cell(run: Run) -> None:
    (data,) = displayed(run.cells["plot"])
    assert len(data["image/png"]) > 10_000


def test_a_fit_in_a_task_is_stopped_from_another_cell(run: Run) -> None:
    assert displayed(run.cells["task"]) == []
    assert printed(run.cells["stop"]) == "cancelled by Learner.stop: seen enough\n"


def test_what_is_printed_meanwhile_is_left_as_it_is(run: Run) -> None:
    printing = run.cells["printing"]
    said = ["said 0 True", "said 0 False", "said 1 True", "said 1 False"]
    assert printed(printing).splitlines() == said
    (progress,) = displayed(printing)
    assert lines(progress)[-1] == "completed 2 epochs"
    assert run.messages["printing", "display_data"] == 1


def test_a_failed_fit_leaves_its_table_and_its_curve(run: Run) -> None:
    failing = run.cells["failing"]
    assert printed(failing) == "broken\n"
    progress, curve = sorted(displayed(failing), key=lambda data: "image/png" in data)
    assert [line.split()[0] for line in lines(progress)[2:]] == ["1", "2", "failed"]
    assert lines(progress)[-1].endswith(": broken")
    assert "image/png" in curve


def test_nothing_is_written_to_standard_error(run: Run) -> None:
    for cell in run.cells.values():
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", output
    assert run.stderr == ""


def test_the_file_holds_no_outputs() -> None:
    saved = json.loads(NOTEBOOK.read_text())
    assert saved["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in saved["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
