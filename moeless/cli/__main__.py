"""`python -m moeless.cli`: the command line where the script `moeless` is not on the path."""

from moeless.cli import main

if __name__ == "__main__":
    main()
