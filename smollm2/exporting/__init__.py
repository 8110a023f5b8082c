"""Export a model as a Hugging Face folder, and verify that the folder contains the same model.

Read `hugging_face.py` (what is written), then `certificate.py` (the verification) with `readers.py` (the libraries
that load the folder, and their results), and `card.py` (the README of the folder).
"""
