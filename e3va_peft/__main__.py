"""`python -m e3va_peft` is `e3va`."""

from e3va_peft.cli import main

if __name__ == "__main__":
    main()
