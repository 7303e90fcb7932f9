"""The command `hub`."""


def main() -> None:
    """Run the command line."""
