"""The transformer, from its parts to the loss. It is independent of data, device setup and training.

Read in this order: transformer.py (the whole network), functional.py (normalization, rotary embedding, SwiGLU),
attention.py (the backends) with blocks.py (a backend for CPUs), loss.py, and cache.py (the key-value cache).
"""
