"""Studies, each a program: `python -m experiments.studies.gap`.

`study` runs variants of one configuration over seeds, each in a workdir of its own (`trials`).
"""
