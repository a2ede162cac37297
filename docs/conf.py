"""The documentation site, for Sphinx: `make docs`.

Building and reading load nothing from the network: formulas become MathML, fonts are local.
"""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # document this checkout

from moh_dit.common.version import __version__  # noqa: E402

project = "MoH-DiT"
author = "the MoH-DiT authors"
release = __version__
needs_sphinx = "8.2"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as training.md#averages
default_role = "code"  # docstrings use `code` and ``code`` alike
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "MoH-DiT"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def _inline(translator, node):
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _display(translator, node):
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _name_files(app, docname, source):
    """Links to files outside docs/ work in the repository; here they become the files' names."""
    for path in re.findall(r"\]\(\.\./([^)#]+)\)", source[0]):
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{docname} links to {path}")
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)\)", r"\1 (`\2`)", source[0])


def setup(app):
    app.connect("source-read", _name_files)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"version": installed("latex2mathml"), "parallel_read_safe": True}
