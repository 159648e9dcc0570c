"""What torchrun and a Ray job run, for example:
torchrun --master-port 29500 --nproc-per-node 2 launch/train.py -c FILE key=value ...

A rank of torchrun trains; without torchrun this starts a local Ray, or joins RAY_ADDRESS, as
`lwo-dist train` does.
"""

import sys

from lwo_dist.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
