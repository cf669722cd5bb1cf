"""A model as units of locality, and its layers put on factors."""
