"""A recorded program as an energy of its states: passes with states in place, plain or as traced code."""
