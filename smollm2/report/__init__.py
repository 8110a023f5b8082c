"""The report: a page about one or more runs, and curves in the terminal, built from the run folders alone.

Read `reading.py` (the run folder), `verdict.py` (the sentences), `sections.py` (the parts of the page) and `page.py`
(the file). A section consists of a function that returns data, an entry in `SECTIONS` and a template named after it.
"""
