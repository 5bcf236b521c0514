"""The report: what the stages measured beside the paper's tables, figures and claims (paper.yaml).

`results` reads the stages' files, `comparison` sets them beside the paper, `pages` writes the text.
"""
