"""Mutation testing of the core modules (`make mutants`): do the tests fail when the code is wrong?

mutations.py makes the mutants, coverage_map.py knows which tests run which line, runner.py runs them, report.py prints.
"""
