"""Metrics as pure functions of features, and the folders that evaluations read."""
