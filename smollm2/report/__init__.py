"""The report: a page about one run or several, and curves in the terminal, built from the run folder alone.

Read `reading.py` (the run folder), `verdict.py` (sentences), `sections.py` (the parts of the page) and `page.py` (the
file). A section is a function that returns data, a line in `SECTIONS` and a template of the same name.
"""
