"""Speculative sampling (Chen et al. 2023, arXiv 2302.01318): the parts that the scripts share."""
