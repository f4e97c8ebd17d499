"""Entry points, configurations, reports and benchmarks of speed."""
