"""Ray jobs that decide what is trained on: scores, filters, duplicates, exports."""
