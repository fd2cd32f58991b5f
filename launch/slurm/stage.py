"""One stage of a submitted job, for the cluster's scripts:
`python -P -m launch.slurm.stage state|merge RECIPE STAGE`."""

from __future__ import annotations

import sys

from data_pipeline.errors import UserError
from launch.supervise.rank_group import DONE, USER_ERROR


def state(recipe_path: str, name: str) -> str:
    """`done` or `todo`."""
    from launch.preflight import is_done, stage_job
    from pretrain.recipe.load import load_recipe, run_dir

    recipe = load_recipe(recipe_path, stage=name)
    return "done" if is_done(run_dir(recipe), stage_job(recipe, name), recipe) else "todo"


def merge(recipe_path: str, name: str) -> None:
    """Run a merge stage in this process."""
    from pretrain.merge_stage import run_merge_stage
    from pretrain.recipe.load import load_recipe, run_dir

    recipe = load_recipe(recipe_path, stage=name)
    run_merge_stage(recipe, name, run_dir(recipe))


def main(arguments: list[str]) -> int:
    what, recipe_path, name = arguments
    try:
        if what == "merge":
            merge(recipe_path, name)
        else:
            print(state(recipe_path, name))
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr)
        return USER_ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
