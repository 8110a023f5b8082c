"""Measurements of a model: diagnostics at one step, the loss landscape around its weights, and checks that it is right.

diagnostics.py measures gradients, weights and activations around one step; landscape.py perturbs the weights and
measures the loss. tracking/charts.py plots both. checks.py says what a check is; model_checks.py has those of any model
(with probe.py), own_checks.py those of ours (with reference.py), foreign.py what `smollm2 verify` adds.
"""
