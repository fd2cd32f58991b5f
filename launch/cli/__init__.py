"""The `dromos` command line. `main` is the console script's entry point."""


def main() -> None:
    """Run the `dromos` command."""
    from launch.cli.app import main as run

    run()
