"""The guide: `make docs` builds it into build/docs; a warning is an error."""

import re
from pathlib import Path

project = "torch_ext"
copyright = "the torch_ext authors"
release = re.search(
    r"project\(torch_ext VERSION ([\d.]+)",
    (Path(__file__).parents[1] / "CMakeLists.txt").read_text(),
)[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"torch_ext {release}"
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"exclude-members": "__new__, __init__"}
napoleon_use_rtype = False
