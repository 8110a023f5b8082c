"""Checkpoints: dictionaries of plain values and tensors; no model class is known here.

Read `format.py` first (what is in one), then `validation.py` (a file is read as hostile), `discovery.py` (find and load),
`retention.py` (which files stay, which is the best) and `saving.py` (written in the background while training continues).
"""
