"""Configuration of the documentation site: ``make docs`` builds it into ``build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import rewardops

project = "rewardops"
author = "the authors of rewardops"
copyright = "the authors of rewardops, Apache-2.0"
version = release = rewardops.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "reference_pages", "pictures"]
exclude_patterns = ["_extensions"]

html_theme = "furo"
html_title = f"rewardops {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

# Anchors of headings, as GitHub has them.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# Frameworks need not be installed for the pages of their integrations.
autodoc_mock_imports = [
    "accelerate", "datasets", "omegaconf", "tensordict", "torchrl", "transformers", "trl", "verl",
]  # fmt: skip
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    # Other projects: the build needs no network, hence has no inventory of theirs.
    (r"py:.*", r"(?!rewardops\b).*"),
    # Private types in signatures.
    (r"py:class", r"rewardops\.(core|ops|reference)\..*|rewardops\.\w+\.\w*Options"),
]

linkcheck_timeout = 20
linkcheck_retries = 2
