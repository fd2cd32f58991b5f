"""The Ray backend: submit.py submits a job, driver.py supervises its ranks; local_head.py runs Ray for local jobs."""
