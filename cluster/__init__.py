"""Running elsewhere: submitting jobs to a Ray cluster, and checks of an environment."""
