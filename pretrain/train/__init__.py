"""Trains one stage on one rank: main.py is the entry point, session.py opens the stage, trainer.py has the loop."""
