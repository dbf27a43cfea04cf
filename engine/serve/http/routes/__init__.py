"""The endpoint's routes, a function each, by what they are for."""
