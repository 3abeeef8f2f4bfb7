"""The README's first command: create the environment, then fine-tune a spam classifier with LoRA.

    python setup/run_main.py                   # the embedded model and messages
    python setup/run_main.py --assets book     # OpenAI's 124M weights, UCI's messages
    python setup/run_main.py --help            # all options, those of appendix-E/finetune_spam.py
"""

import sys

import make_environment

if __name__ == "__main__":
    options = sys.argv[1:]
    if not any(option.split("=")[0] == "--assets" for option in options):
        options = ["--assets", "embedded", *options]
    sys.exit(make_environment.run(make_environment.MAIN, "appendix-E/finetune_spam.py", *options))
