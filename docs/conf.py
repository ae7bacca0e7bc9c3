"""Sphinx: Markdown through MyST, furo's theme, nothing fetched while building."""

from ftkit import __version__

project = "ftkit"
author = "the ftkit authors"
copyright = "2026, the ftkit authors"  # noqa: A001
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"ftkit {release}"
