"""From a request to a plan: request.py checks the options, planner.py decides what happens to each tensor."""
