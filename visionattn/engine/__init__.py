"""Verbs: train and evaluate. A configuration or weights in, results out."""
