"""A trained model in use: loading, generation, evaluation.

Read in this order: loading.py, with weights.py and hugging_face_folder.py for stored tensors and foreign configs;
generation.py, with sampling.py (how a token is drawn) and decoding.py (the fast pass for one token); evaluation.py, with
text_windows.py (a text of any size) and ratio.py (confidence intervals).
"""
