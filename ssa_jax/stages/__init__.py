"""A training step over stages of units on devices: which device has what, and what it does."""
