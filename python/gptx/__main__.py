"""``python -m gptx``: the same as the command ``gptx``."""

import sys

from gptx.cli import main

if __name__ == "__main__":
    sys.exit(main())
