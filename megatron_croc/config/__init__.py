"""Configuration of a run: dataclasses, reading and changing them, and checks. Without torch."""
