"""Copies the lead figure of each notebook to `figures/`, from where the first cell shows it.

`make notebooks` runs this after the notebooks. The lead figure is the image in the outputs of the
code cell with the tag "lead". It is a file, and no attachment of the first cell, because jupytext
drops attachments and myst-nb does not show them.
"""

import base64
from pathlib import Path

import nbformat

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))


def lead_image(notebook):
    """The bytes of the PNG image that the cell tagged "lead" shows."""
    tagged = [cell for cell in notebook.cells if "lead" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(
            f'{len(tagged)} cells have the tag "lead", expected one. Write `# %% tags=["lead"]` '
            "above the code cell that draws the lead figure."
        )
    data = [output.get("data", {}) for output in tagged[0].get("outputs", [])]
    images = [formats["image/png"] for formats in data if "image/png" in formats]
    if len(images) != 1:
        raise ValueError(
            f'The cell tagged "lead" shows {len(images)} PNG images, expected one. Run the '
            "notebook, or tag another cell."
        )
    return base64.b64decode(images[0])


def figure_path(path):
    """The file with a notebook's lead figure."""
    return FOLDER / "figures" / f"{path.stem}.png"


def main():
    for path in NOTEBOOKS:
        try:
            image = lead_image(nbformat.read(path, 4))
        except ValueError as error:
            raise SystemExit(f"{path.name}: {error}") from None
        figure_path(path).parent.mkdir(exist_ok=True)
        figure_path(path).write_bytes(image)


if __name__ == "__main__":
    main()
