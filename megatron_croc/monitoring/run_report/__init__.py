"""Pictures, tables and the page of `croc report`.

stages.py         metrics.jsonl and run.yaml of each stage      -> curve_figures.py
heldout.py        a packed row of held-out samples              -> mask_figures.py
observations.py   the trained model on held-out images          -> image_figures.py, pool_figures.py
page.py           all of it in one HTML file
"""
