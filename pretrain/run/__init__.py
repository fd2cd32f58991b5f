"""What is known about a run from its folder: addresses of weights, complete checkpoints, identity, lock and logs."""
