"""The page of a grid: one file that opens offline, figures to print, and tables for LaTeX."""
