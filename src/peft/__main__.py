"""`python -m peft` is the `peft` command: what `torchrun -m peft train ...` and `accelerate launch -m peft` start."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
