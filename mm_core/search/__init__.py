"""Vectors of a set of samples, and finding the nearest of them."""
