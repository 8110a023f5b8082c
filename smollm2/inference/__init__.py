"""A trained model in use: loading, decoding, generation, evaluation."""
