"""The main job: create the environment, then fine-tune a spam classifier with LoRA.

    python setup/run_main.py                   # the embedded model and messages
    python setup/run_main.py --assets book     # OpenAI's 124M weights, UCI's messages
    python setup/run_main.py --help            # all options, those of appendix-E/finetune_spam.py

It runs in the current folder, so the results go there. The variable LLM_ASSETS replaces the default.
"""

import os
import sys

from book_assets.command_line import command
from make_environment import MAIN, REPOSITORY, run


@command
def main(_):
    chosen = os.environ.get("LLM_ASSETS", "").strip()
    default = [] if chosen else ["--assets", "embedded"]  # the arguments' own --assets, which is later, wins
    run(MAIN, REPOSITORY / "appendix-E" / "finetune_spam.py", *default, *sys.argv[1:])


if __name__ == "__main__":
    main()
