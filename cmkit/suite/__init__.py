"""A suite: one recipe varied in rows, axes and seeds, of which each cell is an ordinary run."""
