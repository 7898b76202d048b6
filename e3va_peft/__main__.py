"""`python -m e3va_peft`, which is `e3va`."""

import sys

from e3va_peft.errors import MissingExtra, require_train


def main() -> None:
    """Run the command line, or name the install line of what it needs."""
    try:
        require_train("e3va")
        from e3va_peft.cli import main as run

        run()
    except MissingExtra as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while it imports: typer takes it from there
        sys.exit(130)


if __name__ == "__main__":
    main()
