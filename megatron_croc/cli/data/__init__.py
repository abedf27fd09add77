"""Subcommands of `croc data`."""
