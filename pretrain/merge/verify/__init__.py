"""`dromos verify`: check_output.py checks an output, recompute.py recomputes parts of it from the inputs."""
