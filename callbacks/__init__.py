"""What happens between and around phases: evaluation, rejection sampling, merging, pictures, throughput, guards."""
