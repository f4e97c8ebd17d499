"""Lightning callbacks that work between and around the phases of training: evaluation, rejection sampling, merging,
pictures, throughput, guards.
"""
