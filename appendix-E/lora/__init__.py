"""LoRA for any model: choose layers, merge, save, combine, exchange with PEFT. Needs `appendix_e.py`."""
