"""How: the passes, each a function of a graph."""
