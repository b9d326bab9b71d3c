"""``python -m gradguard.cli``: the command line without the installed script."""

from gradguard.cli import main

if __name__ == "__main__":
    main()
