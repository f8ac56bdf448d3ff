"""The command line: each command registers its own parser."""
