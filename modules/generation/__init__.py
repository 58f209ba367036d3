"""Decoding: greedy, beam search and sampling over a step function. Knows token ids, nothing of words or images."""

from modules.generation.greedy import greedy_search

__all__ = ["greedy_search"]
