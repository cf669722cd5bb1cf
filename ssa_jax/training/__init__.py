"""One step of training as pure functions: passes, losses, optimisers, ranks, checkpoints."""
