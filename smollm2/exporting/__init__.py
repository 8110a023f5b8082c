"""Export a model as a Hugging Face folder, with evidence that it is the same model.

Read `hugging_face.py` (what is written), then `certificate.py` (what is compared) with `readers.py` (the libraries
that load the folder, and what each finds), and `card.py` (the README of the folder).
"""
