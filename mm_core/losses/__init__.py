"""Losses: pure functions of tensors. What other ranks hold comes in as an argument."""
