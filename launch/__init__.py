"""Turns a command into running ranks: cli/app.py has the commands, run.py hands a job to a backend."""
