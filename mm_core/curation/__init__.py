"""What decides which samples are trained on: rules, the values they measure, and the reasons they give."""
