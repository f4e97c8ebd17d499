"""Entry points, configurations, reports and speed benchmarks."""
