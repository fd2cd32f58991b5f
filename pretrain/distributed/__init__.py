"""What the ranks do together: engine.py wraps DeepSpeed, collectives.py sums and gathers values over the ranks."""
