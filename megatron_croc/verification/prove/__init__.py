"""The list of `croc prove`: stages in time boxes, their results, and the cards made from them.

stages.py   what is run, in order of worth      (stage.py: the form of an entry)
runner.py   one process for each command, a time box for each stage, results written at once
result.py   the result of a stage, as a file
figures.py  the figures that are read from what the commands wrote
card.py     one page for each recipe, from results alone
machine.py  devices and versions, looked at in a process of its own
"""
