"""The user's step as a program: recorded once, cut afterwards, run at any point of a relaxation.

`recorder` notes what the user's one pass computes, below autograd; `record` says what a record consists of. `wiring`
reads from it which states, parameters and modules feed which, `layers` chooses the calls that carry states, and
`interpreter` runs the record with states in their places. `check` compares a new record with autograd's own gradient.
"""
