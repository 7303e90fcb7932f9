"""`python -m graftory` is the command `hub`."""

from graftory.cli import main

main()
