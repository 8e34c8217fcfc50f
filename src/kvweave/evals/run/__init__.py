"""A plan of cells, computed by one or more processes, stored as it goes."""
