"""Sphinx: Markdown through MyST, furo's theme, nothing fetched while building."""

from ftkit import __version__

project = "ftkit"
author = "the ftkit authors"
copyright = "2026, the ftkit authors"  # noqa: A001
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Frameworks are not needed to read how they are used.
autodoc_mock_imports = [
    "transformers",
    "accelerate",
    "lightning",
    "torchmetrics",
    "ray",
    "pandas",
    "triton",
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# Types of torch and of Python have no pages here to lead to.
nitpick_ignore_regex = [("py:.*", ".*")]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"ftkit {release}"
