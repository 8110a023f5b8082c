"""From text to batch n, each stage in its own modules:

1. `text.py` reads and checks a file of UTF-8 text and splits it into documents, and these into chunks. `sources.py` does so
   for folders, JSONL, parquet and data sets of the hub; `sample.py` writes the sample corpus.
2. `tokenizer.py` turns each chunk into token ids.
3. `building.py` writes the ids into a cache on disk; `store.py` opens it, and `token_inputs.py` opens token files of others.
   `corpus.py` puts these three stages together for a config.
4. `windows.py` views each stream of ids as windows of input ids and labels; `packing.py` fills windows with documents.
5. `batches.py` gives batch n of a run: windows in an order that is a function of the seed and n; `mixing.py` mixes sources.
"""
