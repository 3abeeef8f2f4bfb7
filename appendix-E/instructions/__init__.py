"""Instruction fine-tuning, chapter 7's task: instructions and answers, padded batches, training, scores."""
