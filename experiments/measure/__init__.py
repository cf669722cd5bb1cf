"""Times of programs side by side, costs of training steps, and exports beside what was trained."""
