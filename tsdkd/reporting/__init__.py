"""From result files and tables of numbers to plots and pages; no torch."""
