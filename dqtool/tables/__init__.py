"""Tables of comparisons: `python -m dqtool.tables recipes/tables/NAME.yaml`, or `make table-NAME`.

A table is a YAML file (`spec.py`). Each of its rows, groups and seeds is a cell: a chain of stages (`planning.py`). A finished
cell is a small JSON under `recipes/results/cells` (`cells.py`), named by a hash of everything that determines it. A cell that
is finished is never run again, whichever table, checkout or order asks for it.
"""
