"""Experiments, run by `python -m experiments.NAME`: a folder or a file for each.

Shared by all of them:

- `data`: data sets, and the order of examples
- `models`: networks, their weights, training and evaluation
- `estimates`: the table of methods, fits, and the search for dampings
- `running`: arguments, the runner that keeps results, files, memory and processes
- `report`: tables and figures
"""
