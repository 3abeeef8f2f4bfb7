"""A GPT fine-tuned to predict the next token, with or without LoRA, and its loss on other texts."""
