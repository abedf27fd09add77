"""Commands: parse, build, run; an error names what to do about it."""
