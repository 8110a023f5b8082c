"""Measurements of a model in training: its diagnostics at one step, and the loss landscape around its weights.

diagnostics.py reads gradients, weights and activations around one step; landscape.py moves the weights and measures the loss.
tracking/charts.py draws both.
"""
