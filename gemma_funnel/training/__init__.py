"""Training: objectives, optimizer, sharding, checkpoints, the loop."""
