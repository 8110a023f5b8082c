"""Checkpoints: dictionaries of plain values and tensors; this code depends on no model class.

Read `format.py` first (the contents), then `validation.py` (files are untrusted), `discovery.py` (find and load),
`retention.py` (which files are kept, which is best) and `saving.py` (write in the background while training continues).
"""
