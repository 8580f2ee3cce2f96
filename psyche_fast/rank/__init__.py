"""One rank's training: topology, gradients, optimisers, checkpoints. Knows no store and no data."""
