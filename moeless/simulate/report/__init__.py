"""Show the results of a simulation: numbers, tables, plots and one HTML page."""
