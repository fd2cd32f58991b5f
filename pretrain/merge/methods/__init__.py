"""The arithmetic of the merge methods; compute.py chooses the function of a method.

A new method has an entry in:

- methods/compute.py: METHODS, the function that computes a tensor.
- merge_plan.py: Method; if specs and flags shall have it, also METHODS; if it adds differences to a base, also
  NATIVE_BASE_METHODS.
- planning/describe.py: THETA, its formula; PASSES, if it reads its inputs more than once.
- planning/request.py and planning/planner.py: the checks of its options, and the options that go into the plan.
- spec.py and launch/cli/merging/flags.py: the names that a spec and `--method` accept or list.
- mergekit/yaml_file.py and mergekit/tensor_recipe.py: its parameters and its terms in mergekit files.
"""
