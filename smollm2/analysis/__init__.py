"""Measurements of a model in training: diagnostics at one step, and the loss landscape around its weights.

diagnostics.py measures gradients, weights and activations around one step; landscape.py perturbs the weights and
measures the loss. tracking/charts.py plots both.
"""
