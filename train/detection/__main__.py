"""`python -m zoo.train.detection` is `zoo detect`; `torchrun --nproc-per-node=2 -m zoo.train.detection` on two GPUs."""

import sys

from zoo.train.detection.app import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
