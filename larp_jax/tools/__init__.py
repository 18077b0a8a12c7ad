"""What one looks at beside training: analysis, reports, benchmarks, plans, and the doctor."""
