"""The merge commands of `dromos`: one file per command; flags.py has their options."""
