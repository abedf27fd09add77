"""Faults put into real runs, and whether what is promised for them is kept; see chaos.py."""
