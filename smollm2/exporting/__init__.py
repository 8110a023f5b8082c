"""Export a model as a Hugging Face folder or a GGUF file, and verify that it contains the same model.

Read `export.py` (the order of things), then for Hugging Face `hugging_face.py` (what is written), `certificate.py` (the
verification) and `readers.py` (the libraries that load the folder, and their results); for GGUF `gguf.py`,
`gguf_contents.py` and `gguf_readers.py`; and `card.py` (the README of the folder).
"""
