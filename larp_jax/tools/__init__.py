"""Tools besides training: token analysis, run reports, benchmarks, plans, and the check of the installation."""
