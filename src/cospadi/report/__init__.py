"""The report: one page of HTML on a compressed model, and its summary in Markdown."""
