"""`python -m cmkit` is the command cmkit."""

from cmkit.cli import main

if __name__ == "__main__":
    main()
