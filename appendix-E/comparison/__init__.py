"""Ways to fine-tune compared on equal terms: the same tasks, a learning rate for each, several seeds."""
