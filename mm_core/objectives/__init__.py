"""Objectives: from a model's output to named loss terms, and what of them is back-propagated."""
