"""The report: what the stages measured beside the paper's tables, figures and claims (paper.yaml).

`read` takes in the stages' files, `build` compares them with the paper, `markdown` renders the
template, `page` makes its text one HTML page.
"""

from __future__ import annotations

from pipeline.report.comparison import VARIED, build
from pipeline.report.pages import markdown, page, readme_table
from pipeline.report.results import Results, read

__all__ = ["VARIED", "Results", "build", "markdown", "page", "read", "readme_table"]
