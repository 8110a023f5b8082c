"""Checkpoints: dictionaries of plain values and tensors; this code depends on no model class.

Read `format.py` first (the contents), then `validation.py` (the checks of untrusted files), `discovery.py` (finding and
loading checkpoints), `retention.py` (which files are kept, and which is the best) and `saving.py` (writing in the
background while training continues).
"""
