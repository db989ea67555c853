"""A model test: tables, declarations, binds and steps are drawn, and compared with plain Python.

========================  =======================================================================
`scenario`                the data of one example, printable as Python
`kinds`                   the types of columns, with values in ascending order and unreadable ones
`strategies`              how scenarios are drawn
`world`                   the tables, classes, engines and rows of a scenario in a database
`adapter`                 the only calls of the library
`model`                   what every step must do, in plain Python
`runner`                  runs a scenario: a thread for each actor, a check after each step
`known`                   the faults that are known, each with the predicate that leaves it out
`planted`                 small changes to the library that the tests must catch
========================  =======================================================================

    python -m tests.model --minutes 10 --seed 1 --database postgresql
"""
