"""How Sphinx builds the pages: `make docs`."""

import sys
from pathlib import Path

import jaxsoft

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "jaxsoft"
author = "The jaxsoft authors"
copyright = "2026, the jaxsoft authors"
version = release = jaxsoft.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",  # formulas without a network
    "docstrings",
    "generated",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
nitpicky = True  # a reference to a name or page that does not exist is an error

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # they were committed executed, and the tests run them

autodoc_typehints = "none"  # shapes and dtypes are those of the text
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": "object"}
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Numerics", "notes_style")]
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
default_role = "code"  # `x` in a docstring

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "jaxsoft"
html_static_path = ["_static"]
html_css_files = ["jaxsoft.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}
