"""What a run shows: progress, pictures, events for TensorBoard, a diagnosis."""
