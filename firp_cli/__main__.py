"""`python -m firp_cli`: the `firp` command, for launchers that start modules."""

from firp_cli.cli.app import main

if __name__ == "__main__":
    main()
