"""A training step as straight-line code: recorded once, compared at every step, run at every point of a relaxation.

`tape` records the first pass; `comparison` tells whether a later one does the same; `captures` keeps what was captured.
`recording` writes out energies and slopes (`formulas`) on that record for one kind of evaluation (`mode`); `lowering`
turns nodes of the record into operations, `simplify` leaves out what arithmetic makes superfluous, `program` sorts the
rest into stages, `faster` and `compiled` make them quick, `writing` makes Python of them. `checking` compares the code
with one plain pass. `replay` is the network that runs it. `front` knows which layers a signal has not reached;
`continuation` and `pairs` carry records to complex numbers; `contrast` sums the updates of phases.
"""
