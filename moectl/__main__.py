"""Make `python -m moectl` the same as the `moectl` script; it decides nothing."""

from moectl.cli import main

if __name__ == "__main__":
    main()
