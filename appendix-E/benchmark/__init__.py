"""Measurements of speed, memory and accuracy: `python appendix-E/benchmark/run.py`."""
