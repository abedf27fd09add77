"""A run at a glance: `croc monitor RUN_DIR`.

reading.py     what training wrote                 --> RunView
terminal.py    RunView --> a frame of text
charts.py      numbers --> SVG
page.py        RunView --> one HTML file
"""
