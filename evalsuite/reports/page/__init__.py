"""One HTML page of everything in some runs: a single file that opens offline and asks no network for anything."""
