"""The core of mm: plain Python and torch, no Ray, no MLflow, no web framework."""
