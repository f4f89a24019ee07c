"""The grid: several models under several conditions, each cell kept, compared and scanned."""
