"""Sphinx's configuration: `make docs` builds the site into build/docs, without network."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import fusionpass  # noqa: E402
from fusionpass.op import OPS  # noqa: E402

project = "fusionpass"
author = "The fusionpass authors"
copyright = author
version = release = fusionpass.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
]
html_theme = "furo"
html_title = f"fusionpass {version}"

# Links to headings, as GitHub makes them.
myst_heading_anchors = 3

# Single backticks in docstrings are code.
default_role = "code"
# "--help" is no dash.
smartquotes = False
add_module_names = False
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# An op is an object that is called like its reference: it is documented as that function.
for _op in OPS.values():
    _op.__signature__ = _op.signature


def as_list_tables(app, what, name, obj, options, lines):
    """Write the Markdown tables of a docstring, which are easy to read in a source, as reStructuredText's."""
    made, inside = [], False
    for line in lines:
        row = line.strip()
        table = row.startswith("|") and row.endswith("|")
        if table and not inside:
            made += ["", ".. list-table::", "   :header-rows: 1", ""]
        if table and set(row) - set("|-"):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            made += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells)]
        elif not table:
            made += ["", line] if inside else [line]
        inside = table
    lines[:] = made


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", as_list_tables)
