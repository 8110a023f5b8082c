"""A trained model as the world loads it: the folder, and the proof that it is the same model."""
