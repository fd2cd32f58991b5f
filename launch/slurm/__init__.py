"""The Slurm backend: sbatch.py writes and submits the script; job_step.py has the commands that the script runs."""
