"""Tables of comparisons: `python -m dqtool.tables recipes/tables/NAME.yaml`, or `make table-NAME`.

A table is a YAML file (`spec.py`). Its rows, groups and seeds make cells, each a chain of the five stages (`planning.py`).
A finished cell is one small JSON under `recipes/results/cells` (`cells.py`), named by all that decides it: what was measured
once is never measured again, in whatever table, checkout or order.
"""
