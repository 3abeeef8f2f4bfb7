"""The README's first command: set everything up, then fine-tune a spam classifier with LoRA.

    python setup/run_main.py                                        # the embedded model and messages
    python setup/run_main.py --assets book                          # OpenAI's 124M weights, UCI's messages
    python setup/run_main.py --help                                 # all options of appendix-E/appendix_e.py
"""

import sys

import environment

if __name__ == "__main__":
    options = sys.argv[1:]
    if not any(option.split("=")[0] == "--assets" for option in options):
        options = ["--assets", "embedded", *options]
    sys.exit(environment.run(environment.MAIN, "appendix-E/appendix_e.py", *options))
