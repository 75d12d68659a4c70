"""What all methods share: the optimizer, its state, and how a step is made."""
