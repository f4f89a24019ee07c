"""`dodoco top`: a live view over the recordings there are."""
