"""Training: the state, the optimizer, the step and the loop around it."""
