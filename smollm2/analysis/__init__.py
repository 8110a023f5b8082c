"""Diagnostics of a model in training, and the loss landscape around it."""
