"""Notebooks equal their paired text, show its outputs, and their claims hold."""

import base64
import re
from pathlib import Path

import jupytext
import lead_figures
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_a_notebook_equals_its_paired_text(path):
    cells, text = jupytext.read(path).cells, jupytext.read(path.with_suffix(".py")).cells
    assert [(cell.cell_type, cell.source) for cell in cells] == [
        (cell.cell_type, cell.source) for cell in text
    ]


@each
def test_the_first_cell_shows_the_image_of_the_cell_tagged_lead(path):
    notebook, text = nbformat.read(path, 4), jupytext.read(path.with_suffix(".py"))
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert tags == [cell.metadata.get("tags", []) for cell in text.cells]

    first, figure = notebook.cells[0], lead_figures.figure_path(path)
    assert first.cell_type == "markdown"
    (shown,) = re.findall(r"!\[.+\]\((.+)\)", first.source)
    assert FOLDER / shown == figure
    assert figure.read_bytes() == lead_figures.lead_image(notebook)


def test_every_lead_figure_belongs_to_a_notebook():
    figures = FOLDER / "figures"
    assert set(figures.iterdir()) == {lead_figures.figure_path(path) for path in NOTEBOOKS}


def code_cell(*images, tags=("lead",)):
    outputs = [
        nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(image).decode()})
        for image in images
    ]
    text = nbformat.v4.new_output("stream", text="not an image")
    return nbformat.v4.new_code_cell(outputs=[text, *outputs], metadata={"tags": list(tags)})


def test_the_lead_image_is_that_of_the_tagged_cell():
    cells = [code_cell(b"other", tags=()), code_cell(b"lead"), code_cell(b"last", tags=["late"])]
    assert lead_figures.lead_image(nbformat.v4.new_notebook(cells=cells)) == b"lead"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([code_cell(b"image", tags=())], "0 cells have the tag"),
        ([code_cell(b"one"), code_cell(b"two")], "2 cells have the tag"),
        ([code_cell()], "shows 0 PNG images"),
        ([code_cell(b"one", b"two")], "shows 2 PNG images"),
    ],
)
def test_rejects_a_notebook_without_one_lead_image(cells, message):
    with pytest.raises(ValueError, match=message):
        lead_figures.lead_image(nbformat.v4.new_notebook(cells=cells))


@each
def test_outputs_come_from_one_run_without_errors(path):
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, 1 + len(code)))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@each
def test_a_notebook_runs_and_its_claims_hold(path):
    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
