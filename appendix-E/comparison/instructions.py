"""The task of following instructions, for `comparison.grid`: answers to entries not seen in training."""

from dataclasses import replace

import torch

from appendix_e import count_parameters
from book_assets import get_tokenizer
from comparison.tasks import judged_parts
from instructions.data import encode_entry, load_instructions
from instructions.scores import answer_all, score_answers
from instructions.training import InstructionSettings, answer_loss, fit_instructions
from language_model.training import TextHistory, load_language_model

QUIET = InstructionSettings(progress=False)
ANSWER_TOKENS = {"embedded": 20, "book": 80}  # at most; the longest right answers have 8 and 50


class InstructionTask:
    """Training on instructions; an answer is right if its words are those of the one right answer.

    - `settings`: an `InstructionSettings`; learning rate, seed and mask_prompt are those of each run instead
    - `size`: of GPT-2, with choice.model "book"
    - `counts`: {part: number} of entries to take, the first ones, where not all are wanted
    """

    tuning_seeds = (101,)

    def __init__(self, choice, device, settings=QUIET, size="124M", counts=None):
        self.size, self.device = choice.model_size(size), device
        self.settings = settings
        self.answer_tokens = ANSWER_TOKENS[choice.data]
        self.tokenizer = get_tokenizer()
        self.parts = {
            name: part[: (counts or {}).get(name, len(part))]
            for name, part in load_instructions(choice).items()
        }
        self.encoded = {
            name: [encode_entry(entry, self.tokenizer) for entry in part] for name, part in self.parts.items()
        }
        self.about = {
            "task": "instructions", "model": self.size, "data": choice.data,
            "counts": {name: len(part) for name, part in self.parts.items()},
            "epochs": self.settings.epochs, "batch_size": self.settings.batch_size,
            "weight_decay": self.settings.weight_decay,
        }

    def train(self, contender, rate, seed):
        """Return (a new model, trained as the contender says, its `TextHistory`).

        The contender has `mask_prompt` and `adapt(model)`, which freezes or adapts `model`; where nothing is
        left to train, the history is empty. `config` is then the model's configuration.
        """
        model, self.config = load_language_model(self.size)
        torch.manual_seed(seed)
        contender.adapt(model).to(self.device)
        if not count_parameters(model)[0]:
            return model, TextHistory()
        settings = replace(
            self.settings, learning_rate=rate, seed=seed, mask_prompt=contender.mask_prompt
        )
        history = fit_instructions(
            model, self.encoded["train"], settings, self.device, self.encoded["validation"]
        )
        return model, history

    def answers(self, model, name="test"):
        """Return the answers of `model` to the entries of the part `name`."""
        return answer_all(model, self.tokenizer, self.parts[name], self.answer_tokens)

    def run(self, contender, rate, seed, tuning=False):
        """Train a new model; return its numbers.

        Losses are the answers' in nats per token, whatever was trained on, so that they can be compared; test
        and test_f1 are the scores of all entries, exact_TASK and f1_TASK those of one task; known_wording and
        new_wording stand for TASK, too. `tuning` leaves the test part out.
        """
        model, history = self.train(contender, rate, seed)
        numbers = {
            "trained": count_parameters(model)[0], "steps": len(history.losses),
            "seconds_per_step": history.seconds / max(1, len(history.losses)),
        }
        for name in judged_parts(tuning):
            numbers[f"{name}_loss"] = answer_loss(model, self.encoded[name], self.device)
        return numbers if tuning else numbers | self.judge(model)

    def judge(self, model):
        """Return the scores of the answers to the test part, 0 to 1."""
        answers, entries = self.answers(model), self.parts["test"]
        scores = score_answers(entries, answers)
        numbers = {"test": scores.loc["all", "exact"], "test_f1": scores.loc["all", "f1"]}
        groups = scores.drop("all")
        for name, flag in (("known_wording", False), ("new_wording", True)):
            chosen = [n for n, entry in enumerate(entries) if entry.get("new_wording") is flag]
            if chosen:
                some = score_answers([entries[n] for n in chosen], [answers[n] for n in chosen])
                groups.loc[name] = some.loc["all"]
        for measure in ("exact", "f1"):
            numbers |= {f"{measure}_{name}": value for name, value in groups[measure].items()}
        return {name: float(value) for name, value in numbers.items()}
