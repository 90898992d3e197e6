"""`python -m zoo.train` is `zoo train`; under torchrun, `torchrun --nproc-per-node=2 -m zoo.train`."""

import sys

from zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
