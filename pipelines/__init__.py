"""Ray Data and Ray Train jobs over mm_core: index, stream, train, evaluate, track, register; and the recipes."""
