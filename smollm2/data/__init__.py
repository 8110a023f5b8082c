"""From a file to batch n in five stages, each in its own module:

1. `text.py` reads and checks a file of UTF-8 text, splits it into documents, and splits these into chunks that fit in
   memory. `sources.py` does so for folders, JSONL, parquet and data sets of the hub. `sample.py` writes the sample corpus
   if the user has no file.
2. `tokenizer.py` turns each chunk into token ids: by a byte-level BPE trained on the corpus, or by a given tokenizer.
3. `store.py` writes the ids of all documents, an end of text after each, into a cache on disk, splits off the
   validation text, and maps both into memory.
   `corpus.py` puts these three stages together for a config.
4. `windows.py` views each stream of ids as overlapping windows of input ids and labels; each token is a target once.
   `packing.py` fills windows with documents instead, so that few are cut.
5. `batches.py` gives batch n of a run: windows in an order that is a function of the seed and n alone.
"""
