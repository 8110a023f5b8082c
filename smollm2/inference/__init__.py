"""Loading a trained model, generating text with it, and evaluating it.

Read in this order: loading.py, with weights.py (stored tensors) and hugging_face_folder.py (Hugging Face configs);
generation.py, with sampling.py (choosing a token) and decoding.py (a fast forward pass for one token); evaluation.py,
with text_windows.py (windows over a text of any size) and ratio.py (confidence intervals); harness.py (tasks of lm-eval)
with scoring.py (continuations and texts in batches).
"""
