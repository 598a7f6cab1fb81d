"""Train with MaxText's DiLoCo: slices average the differences of their parameters in f32.

It takes the command line of `python -m maxtext.trainers.pre_train.train`.

    python examples/integrations/maxtext_before.py base.yml enable_diloco=true ...
"""

# pyright: reportMissingImports=false

import sys

from maxtext.trainers.pre_train import train

if __name__ == "__main__":
    train.main(sys.argv)
