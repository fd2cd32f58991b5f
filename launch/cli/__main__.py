"""`python -m launch.cli`: the `dromos` command of this interpreter."""

from launch.cli.app import main

if __name__ == "__main__":
    main()
