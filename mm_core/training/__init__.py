"""Optimisation steps and their state, in plain torch: what a training loop, Ray's or torchrun's, calls."""
