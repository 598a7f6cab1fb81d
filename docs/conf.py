"""Sphinx configuration: `make docs` builds the site, without a network."""

import shutil
from pathlib import Path

import signax

# Sphinx reads pages from one folder only.
notebooks = Path(__file__).parents[1] / "notebooks"
ignored = shutil.ignore_patterns("*.py", "__pycache__", ".*")
shutil.copytree(notebooks, Path(__file__).parent / "notebooks", ignore=ignored, dirs_exist_ok=True)

project = "signax"
author = copyright = "The signax authors"
version = release = signax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
nitpicky = True  # an unknown name in a role is an error, as a broken link is

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs

default_role = "literal"  # single backticks in docstrings
autodoc_typehints = "none"  # "Args:" names types and shapes
autodoc_member_order = "bysource"
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "signax"
html_favicon = "_static/logo.svg"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "home_page_in_toc": True,
    "logo": {"image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "text": "signax"},
    "navbar_persistent": [],  # the sidebar has the search
    "show_toc_level": 2,
}
