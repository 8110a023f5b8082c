"""From a text to batches: text.py documents, store.py tokens on disk, windows.py windows, batches.py batch n."""
