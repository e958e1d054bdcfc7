"""`python -m mechlens` is the `mechlens` command."""

from mechlens.cli import main

if __name__ == "__main__":
    main()
